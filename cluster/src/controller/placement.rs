//! Which brokers hold the replicas of new partitions: leaders and followers spread over brokers, and the replicas of a partition
//! over racks (KIP-36). As in Kafka, a broker that is registered but fenced takes replicas too where those that take part are
//! too few: it is expected back, and catches up then.

use std::collections::BTreeMap;

/// A broker that can take replicas.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Its id.
    pub node: i32,
    /// Where it stands, if it says so.
    pub rack: Option<String>,
    /// Whether it takes part; a fenced broker can lead nothing and joins no ISR until it is back.
    pub active: bool,
}

/// Brokers that take part, or those that do not, in an order in which neighbours stand in different racks, as far as there are any.
fn alternating(places: &[Place], active: bool) -> Vec<&Place> {
    let mut racks: BTreeMap<Option<&str>, Vec<&Place>> = BTreeMap::new();
    for place in places.iter().filter(|p| p.active == active) {
        racks.entry(place.rack.as_deref()).or_default().push(place);
    }
    let longest = racks.values().map(Vec::len).max().unwrap_or(0);
    let turn = |i: usize| racks.values().filter_map(move |rack| rack.get(i).copied());
    (0..longest).flat_map(turn).collect()
}

/// Replicas of `count` partitions, `factor` of each, preferred leaders first; the first partition's leader is the `first`-th
/// broker. `factor` is at most the number of brokers, and one at least takes part. Fenced brokers come last, and only where
/// the active ones do not suffice.
#[must_use]
pub fn spread(places: &[Place], first: usize, count: usize, factor: usize) -> Vec<Vec<i32>> {
    let order = alternating(places, true);
    let fenced = alternating(places, false);
    let n = order.len();
    let one = |partition: usize| {
        let leader = partition % n;
        // Each time round, the followers begin at another distance, so that what one broker led falls to many.
        let shift = partition / n;
        let others = (0..n.saturating_sub(1)).map(|i| (leader + 1 + (shift + i) % (n - 1)) % n);
        let active: Vec<&Place> = others.map(|i| order[i]).collect();
        let absent: Vec<&Place> = (0..fenced.len())
            .map(|i| fenced[(partition + i) % fenced.len()])
            .collect();
        let mut chosen = vec![order[leader]];
        for mut rest in [active, absent] {
            while chosen.len() < factor && !rest.is_empty() {
                let in_its_rack = |p: &Place| chosen.iter().any(|c| c.rack.is_some() && c.rack == p.rack);
                let elsewhere = rest.iter().position(|p| !in_its_rack(p));
                chosen.push(rest.remove(elsewhere.unwrap_or(0)));
            }
        }
        chosen.iter().map(|p| p.node).collect()
    };
    (first..first + count).map(one).collect()
}

/// The broker that should hold one more replica of a partition of `replicas`, in the stead of `leaving` if that is given: one that
/// takes part, in a rack that has none of the others if there is one, and among those the one that `load` says has the least.
/// `None` if every active broker has a replica already.
#[must_use]
pub fn substitute(
    places: &[Place],
    replicas: &[i32],
    leaving: Option<i32>,
    load: impl Fn(i32) -> usize,
) -> Option<i32> {
    let stays = |n: i32| replicas.contains(&n) && leaving != Some(n);
    let racks: Vec<&String> = (places.iter())
        .filter(|p| stays(p.node))
        .filter_map(|p| p.rack.as_ref())
        .collect();
    (places.iter())
        .filter(|p| p.active && !replicas.contains(&p.node))
        .min_by_key(|p| {
            (
                p.rack.as_ref().is_some_and(|r| racks.contains(&r)),
                load(p.node),
                p.node,
            )
        })
        .map(|p| p.node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(racks: &[Option<&str>]) -> Vec<Place> {
        let place = |(node, rack): (i32, &Option<&str>)| Place {
            node,
            rack: rack.map(str::to_owned),
            active: true,
        };
        (1..).zip(racks).map(place).collect()
    }

    fn counts(placed: &[Vec<i32>], of: impl Fn(&Vec<i32>) -> Vec<i32>) -> BTreeMap<i32, usize> {
        let mut counts = BTreeMap::new();
        for node in placed.iter().flat_map(of) {
            *counts.entry(node).or_default() += 1;
        }
        counts
    }

    #[test]
    fn leaders_and_followers_are_spread_and_a_brokers_load_falls_to_many() {
        let placed = spread(&places(&[None; 5]), 3, 20, 3);
        assert!(counts(&placed, |r| vec![r[0]]).values().all(|c| *c == 4));
        assert!(counts(&placed, |r| r.clone()).values().all(|c| *c == 12));
        let seconds: Vec<i32> = placed.iter().filter(|r| r[0] == 1).map(|r| r[1]).collect();
        assert_eq!(
            counts(&placed, |r| if r[0] == 1 { vec![r[1]] } else { vec![] }).len(),
            4,
            "{seconds:?}"
        );
        assert!(placed.iter().all(|r| r[0] != r[1] && r[1] != r[2] && r[0] != r[2]));
    }

    #[test]
    fn replicas_stand_in_as_many_racks_as_there_are() {
        let brokers = places(&[Some("a"), Some("a"), Some("b"), Some("b"), Some("c"), Some("c")]);
        let rack = |n: i32| brokers[n as usize - 1].rack.clone();
        for replicas in spread(&brokers, 0, 24, 3) {
            let mut racks: Vec<_> = replicas.iter().map(|n| rack(*n)).collect();
            racks.sort();
            racks.dedup();
            assert_eq!(racks.len(), 3, "{replicas:?}");
        }
        // More replicas than racks: still every broker at most once.
        for mut replicas in spread(&brokers, 0, 6, 5) {
            replicas.sort_unstable();
            replicas.dedup();
            assert_eq!(replicas.len(), 5);
        }
    }

    #[test]
    fn fenced_brokers_come_last_and_only_where_the_others_do_not_suffice() {
        let mut brokers = places(&[Some("a"), Some("b"), Some("c"), Some("d")]);
        brokers[1].active = false;
        assert!(spread(&brokers, 0, 20, 3).iter().all(|r| !r.contains(&2)));
        let placed = spread(&brokers, 0, 20, 4);
        assert!(placed.iter().all(|r| r[3] == 2), "{placed:?}");
        brokers[0].active = false;
        let placed = spread(&brokers, 0, 20, 3);
        assert!(placed.iter().all(|r| r[0] > 2 && r[1] > 2), "{placed:?}");
        assert_eq!(
            counts(&placed, |r| vec![r[2]]).len(),
            2,
            "both absent ones are expected back"
        );
    }

    #[test]
    fn a_substitute_stands_where_no_other_replica_does_and_has_the_least() {
        let brokers = places(&[Some("a"), Some("b"), Some("c"), Some("c"), Some("b")]);
        assert_eq!(substitute(&brokers, &[1, 2, 3], Some(3), |_| 0), Some(4));
        assert_eq!(substitute(&brokers, &[1, 2], Some(1), |n| usize::from(n == 3)), Some(4));
        assert_eq!(substitute(&brokers, &[1, 2, 3, 4, 5], Some(1), |_| 0), None);
        assert_eq!(substitute(&brokers, &[1, 2], None, |n| n as usize), Some(3));
        let mut some = brokers.clone();
        some[2].active = false;
        assert_eq!(substitute(&some, &[1, 2], None, |n| n as usize), Some(4));
    }
}
