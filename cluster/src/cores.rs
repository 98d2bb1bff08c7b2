//! Which core of a node has which of its partitions: decided by the node alone, nobody else needs to know.

use millrace_engine::{PartitionKey, PartitionMap};

use crate::metadata::Image;

/// Where each partition of a node was last.
///
/// One that is taken away and comes back comes back to the same core: that core's journal may still hold records of it, which replay
/// must meet before those that cut them off.
#[derive(Default, Debug)]
pub struct Homes {
    last: PartitionMap<u32>,
}

impl Homes {
    /// A partition is there, or was.
    pub fn note(&mut self, key: PartitionKey, core: u32) {
        self.last.insert(key, core);
    }

    /// Partition → core, of the partitions that an image gives node `me`: those that were here before are where they were, new ones
    /// go to the core with the fewest. Those of the topic `pinned` are on the first core.
    pub fn place(&mut self, image: &Image, cores: usize, me: i32, pinned: &str) -> PartitionMap<u32> {
        let mut load = vec![0_usize; cores];
        let mut placement = PartitionMap::with_capacity_and_hasher(self.last.len(), Default::default());
        let mut new = Vec::new();
        for topic in image.topics() {
            for (index, partition) in topic.partitions.iter().enumerate() {
                let key = PartitionKey {
                    topic: topic.id,
                    partition: index as u32,
                };
                if !partition.replicas.contains(&me) {
                    continue;
                }
                if topic.name == pinned {
                    placement.insert(key, 0);
                } else if let Some(core) = self.last.get(&key).filter(|c| (**c as usize) < cores) {
                    placement.insert(key, *core);
                    load[*core as usize] += 1;
                } else {
                    new.push(key);
                }
            }
        }
        for key in new {
            let core = (0..cores).min_by_key(|c| load[*c]).unwrap_or(0);
            load[core] += 1;
            placement.insert(key, core as u32);
            self.last.insert(key, core as u32);
        }
        // A deleted topic's id never comes back.
        self.last.retain(|key, _| image.topic_by_id(&key.topic).is_some());
        placement
    }
}

/// What one partition made its core do in some time.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Which.
    pub key: PartitionKey,
    /// Its core.
    pub core: usize,
    /// In any unit.
    pub work: u64,
    /// It may go to another core.
    pub movable: bool,
}

/// The move that relieves the busiest core best, if it does at least `enough` and the idlest core does a quarter less: so that the
/// busier of the two has at least a tenth less to do afterwards.
#[must_use]
pub fn relief(loads: &[Load], cores: usize, enough: u64) -> Option<(PartitionKey, usize)> {
    let mut totals = vec![0_u64; cores];
    for load in loads {
        totals[load.core] += load.work;
    }
    let busiest = (0..cores).max_by_key(|c| totals[*c])?;
    let idlest = (0..cores).min_by_key(|c| totals[*c])?;
    let (most, least) = (totals[busiest], totals[idlest]);
    if most < enough.max(1) || least > most / 4 * 3 {
        return None;
    }
    let after = |load: &&Load| (most - load.work).max(least + load.work);
    let best = (loads.iter())
        .filter(|l| l.core == busiest && l.movable && l.work > 0)
        .min_by_key(|l| (after(l), l.work))?;
    (after(&best) <= most - most.div_ceil(10)).then_some((best.key, idlest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::metadata::{MetadataRecord, PartitionImage};

    fn key(partition: u32) -> PartitionKey {
        PartitionKey {
            topic: Uuid::from_u128(9),
            partition,
        }
    }

    fn image(replicas: &[&[i32]]) -> Image {
        let id = *key(0).topic.as_bytes();
        let mut records = vec![MetadataRecord::Topic { id, name: "t".into() }];
        records.extend(replicas.iter().enumerate().map(|(index, r)| MetadataRecord::Partition {
            topic: id,
            partition: index as u32,
            state: PartitionImage::new(r.to_vec()),
        }));
        Image::default().apply(&records)
    }

    #[test]
    fn new_partitions_go_where_the_fewest_are_and_one_that_returns_goes_where_it_was() {
        let mut homes = Homes::default();
        homes.note(key(0), 1);
        let all = homes.place(&image(&[&[1], &[1], &[1], &[1]]), 2, 1, "pinned");
        assert_eq!(all[&key(0)], 1);
        assert_eq!(all.values().filter(|c| **c == 0).count(), 2);
        // The first goes to another node, and others come in its place.
        let fewer = homes.place(&image(&[&[2], &[1], &[1], &[1]]), 2, 1, "pinned");
        assert_eq!(fewer.get(&key(0)), None);
        for core in [0, 1] {
            homes.note(key(0), core);
            homes.place(&image(&[&[2], &[1], &[1], &[1]]), 2, 1, "pinned");
            let back = homes.place(&image(&[&[1], &[1], &[1], &[1]]), 2, 1, "pinned");
            assert_eq!(back[&key(0)], core);
        }
        // Nothing is kept of a topic that is gone, nor a core that is not there.
        homes.place(&Image::default(), 2, 1, "pinned");
        assert!(homes.last.is_empty());
        homes.note(key(0), 7);
        assert_eq!(homes.place(&image(&[&[1]]), 2, 1, "pinned")[&key(0)], 0);
        assert_eq!(homes.place(&image(&[&[1], &[1]]), 2, 1, "t")[&key(1)], 0, "pinned");
    }

    #[test]
    fn one_partition_that_is_all_the_load_stays() {
        let load = |partition, core, work| Load {
            key: key(partition),
            core,
            work,
            movable: true,
        };
        assert_eq!(relief(&[load(0, 0, 1000)], 2, 1), None);
        assert_eq!(
            relief(&[load(0, 0, 1000), load(1, 0, 10)], 2, 1),
            None,
            "hardly any relief"
        );
        assert_eq!(
            relief(&[load(0, 0, 600), load(1, 0, 400)], 2, 1),
            Some((key(1), 1)),
            "the one with less to do, where both relieve as much"
        );
        assert_eq!(relief(&[load(0, 0, 600), load(1, 0, 400)], 2, 1001), None, "idle");
        let pinned = Load {
            movable: false,
            ..load(1, 0, 400)
        };
        assert_eq!(relief(&[load(0, 0, 600), pinned], 2, 1), Some((key(0), 1)));
    }

    proptest! {
        #[test]
        fn moves_end_with_the_work_spread(work in prop::collection::vec((0_usize..4, 0_u64..1000), 1..40)) {
            let mut loads: Vec<Load> = work.iter().enumerate()
                .map(|(p, (core, work))| Load { key: key(p as u32), core: *core, work: *work, movable: true })
                .collect();
            let most = |loads: &[Load]| (0..4).map(|c| loads.iter().filter(|l| l.core == c).map(|l| l.work).sum::<u64>()).max();
            let mut moves = 0;
            while let Some((key, to)) = relief(&loads, 4, 1) {
                let before = most(&loads);
                loads.iter_mut().filter(|l| l.key == key).for_each(|l| l.core = to);
                prop_assert!(most(&loads) <= before);
                moves += 1;
                prop_assert!(moves <= 200, "it does not come to rest");
            }
        }
    }
}
