//! Exchanging the replicas of partitions while they serve (KIP-455): new ones are taken on first, old ones go once the new ones
//! are in sync.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{
    ControllerError,
    brokers::{find, record},
    leadership::Change,
    placement::{Place, substitute},
};
use crate::metadata::{Image, MetadataRecord, PartitionImage, TopicImage};

/// What a partition's replicas are to be: `None` calls off what is being exchanged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Topic.
    pub topic: Uuid,
    /// Partition.
    pub partition: u32,
    /// Preferred leader first.
    pub replicas: Option<Vec<i32>>,
}

/// Replicas that a partition would have if nothing were being exchanged.
fn settled(partition: &PartitionImage) -> Vec<i32> {
    let mut replicas = partition.replicas.clone();
    replicas.retain(|n| !partition.adding.contains(n));
    replicas
}

/// Replicas that a partition is to have in the end.
#[must_use]
pub fn target(partition: &PartitionImage) -> Vec<i32> {
    let mut replicas = partition.replicas.clone();
    replicas.retain(|n| !partition.removing.contains(n));
    replicas
}

/// Begins an exchange, changes its aim, or calls it off.
///
/// # Errors
/// [`ControllerError`]; nothing of the partition is changed then.
pub fn alter(image: &Image, wish: &Wish) -> Result<Option<MetadataRecord>, ControllerError> {
    let (topic, partition) = find(image, &wish.topic, wish.partition).ok_or(ControllerError::UnknownTopic)?;
    let mut change = Change::new(image, topic, partition, |n| image.is_active(n));
    let running = !partition.adding.is_empty() || !partition.removing.is_empty();
    let before = settled(partition);
    let wanted = match &wish.replicas {
        Some(wanted) => {
            check(image, wanted)?;
            wanted
        }
        None if running => &before,
        None => return Err(ControllerError::NoReassignment),
    };
    let next = &mut change.next;
    next.adding = wanted.iter().copied().filter(|n| !before.contains(n)).collect();
    // One that was being taken on and is in sync already is counted on until others are.
    let counted_on = partition.adding.iter().filter(|n| partition.isr.contains(n));
    next.removing = (before.iter().chain(counted_on).copied())
        .filter(|n| !wanted.contains(n))
        .collect();
    next.replicas.clone_from(wanted);
    next.replicas.extend(&next.removing);
    let replicas = &next.replicas;
    next.elr.retain(|n| replicas.contains(n));
    change.complete_reassignment();
    Ok(record(topic, wish.partition, partition, change.next))
}

/// Takes on replicas of a topic's partitions that have fewer than `factor`, on those of `places` that take part: what was created
/// when the cluster was smaller. Partitions without a leader, or whose replicas are being exchanged, are left alone.
#[must_use]
pub fn widen(image: &Image, topic: &TopicImage, factor: usize, places: &[Place]) -> Vec<MetadataRecord> {
    let mut load: BTreeMap<i32, usize> = BTreeMap::new();
    for node in topic.partitions.iter().flat_map(|p| &p.replicas) {
        *load.entry(*node).or_default() += 1;
    }
    let mut records = Vec::new();
    for (partition, index) in topic.partitions.iter().zip(0..) {
        if partition.leader < 0 || !partition.adding.is_empty() || !partition.removing.is_empty() {
            continue;
        }
        let mut replicas = partition.replicas.clone();
        while replicas.len() < factor {
            let more = substitute(places, &replicas, None, |n| load.get(&n).copied().unwrap_or(0));
            let Some(more) = more else { break };
            *load.entry(more).or_default() += 1;
            replicas.push(more);
        }
        if replicas.len() > partition.replicas.len() {
            let wish = Wish {
                topic: topic.id,
                partition: index,
                replicas: Some(replicas),
            };
            records.extend(alter(image, &wish).ok().flatten());
        }
    }
    records
}

fn check(image: &Image, wanted: &[i32]) -> Result<(), ControllerError> {
    let bad = |reason: String| Err(ControllerError::InvalidReplicaAssignment { reason });
    if wanted.is_empty() {
        return bad("a partition needs at least one replica".into());
    }
    for (i, node) in wanted.iter().enumerate() {
        if wanted[..i].contains(node) {
            return bad(format!("broker {node} stands there twice"));
        }
        // One that is fenced is expected back, and is taken on then.
        if image.broker(*node).is_none() {
            return bad(format!("broker {node} is not registered in this cluster"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        controller::{
            brokers::{
                self, IsrChange,
                tests::{TOPIC, cluster_of, partition, registration},
            },
            leadership,
        },
        metadata::ConfigResource,
    };

    fn wish(replicas: Option<&[i32]>) -> Wish {
        Wish {
            topic: TOPIC,
            partition: 0,
            replicas: replicas.map(<[i32]>::to_vec),
        }
    }

    fn apply(image: &Image, replicas: Option<&[i32]>) -> Image {
        image.apply(alter(image, &wish(replicas)).expect("sound").as_slice())
    }

    fn in_sync(image: &Image, isr: &[i32]) -> Image {
        let p = partition(image);
        let change = IsrChange {
            topic: TOPIC,
            partition: 0,
            leader_epoch: p.leader_epoch,
            partition_epoch: p.partition_epoch,
            isr: isr.to_vec(),
        };
        image.apply(&brokers::alter_isr(image, p.leader, &[change]))
    }

    #[test]
    fn new_replicas_come_first_and_old_ones_go_once_they_are_in_sync() {
        let image = apply(&cluster_of(5, &[1, 2, 3]), Some(&[4, 5, 3]));
        let p = partition(&image);
        assert_eq!(p.replicas, [4, 5, 3, 1, 2]);
        assert_eq!((p.adding, p.removing, p.leader), (vec![4, 5], vec![1, 2], 1));
        let image = in_sync(&image, &[1, 2, 3, 4]);
        assert_eq!(partition(&image).replicas.len(), 5, "5 is not in sync yet");
        let image = in_sync(&image, &[1, 2, 3, 4, 5]);
        let p = partition(&image);
        assert_eq!(p.replicas, [4, 5, 3]);
        assert_eq!(p.isr, [3, 4, 5]);
        assert_eq!((p.leader, p.leader_epoch), (4, 6), "the old leader is gone");
        assert!(p.adding.is_empty() && p.removing.is_empty());
    }

    #[test]
    fn fewer_replicas_and_another_order_need_nobody_to_catch_up() {
        let image = apply(&cluster_of(3, &[1, 2, 3]), Some(&[2]));
        let p = partition(&image);
        assert_eq!((p.replicas, p.isr, p.leader), (vec![2], vec![2], 2));
        let image = apply(&cluster_of(3, &[1, 2, 3]), Some(&[3, 1, 2]));
        let p = partition(&image);
        assert_eq!((p.replicas, p.leader), (vec![3, 1, 2], 1));
    }

    #[test]
    fn it_can_be_called_off_and_aimed_elsewhere() {
        let before = cluster_of(5, &[1, 2, 3]);
        assert_eq!(alter(&before, &wish(None)), Err(ControllerError::NoReassignment));
        let image = in_sync(&apply(&before, Some(&[4, 5])), &[1, 2, 3, 4]);
        let off = partition(&apply(&image, None));
        assert_eq!((off.replicas, off.isr, off.leader), (vec![1, 2, 3], vec![1, 2, 3], 1));
        let aimed = partition(&apply(&image, Some(&[1, 5])));
        assert_eq!(aimed.replicas, [1, 5, 2, 3, 4]);
        assert_eq!((aimed.adding, aimed.removing), (vec![5], vec![2, 3, 4]));
        assert_eq!(aimed.isr, [1, 2, 3, 4], "4 is counted on until 5 is in sync");
        // Not where too few of those from before are in sync.
        let image = image.apply(&[MetadataRecord::Config {
            resource: ConfigResource::Topic("t".into()),
            name: leadership::MIN_INSYNC.into(),
            value: Some("2".into()),
        }]);
        let off = partition(&apply(&in_sync(&image, &[1, 4]), None));
        assert_eq!((off.removing, off.isr), (vec![4], vec![1, 4]));
    }

    #[test]
    fn impossible_ones_are_refused() {
        let image = cluster_of(3, &[1, 2, 3]);
        let image = image.apply(&brokers::fence(&image, 3));
        for bad in [&[][..], &[1, 1], &[9], &[1, 9]] {
            assert!(alter(&image, &wish(Some(bad))).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_fenced_broker_is_taken_on_when_it_is_back() {
        let image = cluster_of(4, &[1, 2, 3]);
        let image = apply(&image.apply(&brokers::fence(&image, 4)), Some(&[4]));
        let p = partition(&image);
        assert_eq!((p.adding, p.leader), (vec![4], 1), "those from before serve");
        let image = image.apply(&brokers::register(&image, &registration(4, 4)).expect("known"));
        let p = partition(&in_sync(&image, &[1, 2, 3, 4]));
        assert_eq!((p.replicas, p.leader), (vec![4], 4));
    }

    #[test]
    fn a_topic_that_is_short_gets_the_replicas_that_it_lacks() {
        let place = |node, active| Place {
            node,
            rack: None,
            active,
        };
        let short = apply(&cluster_of(4, &[1, 2, 3]), Some(&[1]));
        let widened = |image: &Image, places: &[Place]| {
            let topic = image.topic_by_id(&TOPIC).expect("there");
            partition(&image.apply(&widen(image, topic, 3, places)))
        };
        let all = [place(1, true), place(2, false), place(3, true), place(4, true)];
        let p = widened(&short, &all);
        assert_eq!((p.replicas, p.adding, p.leader), (vec![1, 3, 4], vec![3, 4], 1));
        let p = widened(&short, &all[..3]);
        assert_eq!(p.replicas, [1, 3], "as far as there are brokers");
        assert_eq!(
            partition(&short),
            widened(&short, &all[..2]),
            "none for one that is away"
        );
        let begun = apply(&short, Some(&[1, 2]));
        assert_eq!(partition(&begun), widened(&begun, &all), "one exchange at a time");
        let enough = cluster_of(4, &[1]);
        assert_eq!(partition(&enough), widened(&enough, &all), "out of sync is not short");
    }
}
