//! Brokers: registration, fencing, and who leads what because of it (KIP-631, KIP-497).

use uuid::Uuid;

use super::ControllerError;
use crate::metadata::{Image, MetadataRecord, PartitionImage, Registration};

/// A broker registers.
///
/// What it led it leads on, under a new epoch; partitions that have no leader and find it in their ISR are led by it. With another
/// data folder than before it holds nothing of what it held, and is in no ISR any more.
///
/// # Errors
/// [`ControllerError::DuplicateBroker`] if another folder's broker answers to this id.
pub fn register(image: &Image, registration: &Registration) -> Result<Vec<MetadataRecord>, ControllerError> {
    let node = registration.node;
    let known = image.broker(node);
    let emptied = known.is_some_and(|b| b.registration.directory != registration.directory);
    if emptied && image.is_active(node) {
        return Err(ControllerError::DuplicateBroker {
            reason: format!(
                "node.id {node} is in use by a broker with another data folder; give this one an id of its own, or stop the other"
            ),
        });
    }
    let mut records = vec![MetadataRecord::Broker(registration.clone())];
    for_each_partition(image, |topic, index, partition| {
        let mut next = partition.clone();
        if emptied && next.isr.contains(&node) {
            leave(&mut next, node, |n| image.is_active(n));
            // Nobody else holds it: what it held is lost, and nobody may lead in its stead and hide that.
            next.isr.retain(|n| *n != node);
            if next.leader == node {
                next.leader = -1;
            }
        } else if next.leader == -1 && next.isr.contains(&node) {
            next.leader = node;
            next.leader_epoch += 1;
        } else {
            return;
        }
        next.partition_epoch += 1;
        records.push(record(topic, index, next));
    });
    Ok(records)
}

/// A broker does not answer, or is about to stop: others lead what it led, and it leaves every ISR that others are in.
#[must_use]
pub fn fence(image: &Image, node: i32) -> Vec<MetadataRecord> {
    if !image.is_active(node) {
        return Vec::new();
    }
    let mut records = vec![MetadataRecord::Fence { node }];
    for_each_partition(image, |topic, index, partition| {
        if partition.leader != node && !partition.isr.contains(&node) {
            return;
        }
        let mut next = partition.clone();
        leave(&mut next, node, |n| n != node && image.is_active(n));
        if next == *partition {
            return;
        }
        next.partition_epoch += 1;
        records.push(record(topic, index, next));
    });
    records
}

/// Takes a node out of a partition's ISR unless it is alone in it, and hands on what it led.
fn leave(partition: &mut PartitionImage, node: i32, active: impl Fn(i32) -> bool) {
    if partition.isr.iter().any(|n| *n != node) {
        partition.isr.retain(|n| *n != node);
    }
    if partition.leader == node {
        let next = (partition.replicas.iter()).find(|n| partition.isr.contains(n) && active(**n));
        partition.leader = next.copied().unwrap_or(-1);
        partition.leader_epoch += 1;
    }
}

/// A broker's logs of some partitions have failed: it leaves their ISRs, and others lead what it led. Where nobody else is in sync
/// it stays: what it has can still be read.
#[must_use]
pub fn give_up(image: &Image, node: i32, partitions: &[(Uuid, u32)]) -> Vec<MetadataRecord> {
    let mut records = Vec::new();
    for (topic, index) in partitions {
        let Some(partition) = image.partition(topic, *index) else {
            continue;
        };
        let others = (partition.isr.iter()).any(|n| *n != node && image.is_active(*n));
        if !partition.isr.contains(&node) || !others {
            continue;
        }
        let mut next = partition.clone();
        leave(&mut next, node, |n| n != node && image.is_active(n));
        next.partition_epoch += 1;
        records.push(record(*topic, *index, next));
    }
    records
}

/// A leader's wish for another ISR (KIP-497).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IsrChange {
    /// Topic.
    pub topic: Uuid,
    /// Partition.
    pub partition: u32,
    /// Epoch of the leadership.
    pub leader_epoch: i32,
    /// Number of the change that it follows.
    pub partition_epoch: i32,
    /// As it should be.
    pub isr: Vec<i32>,
}

/// The changes of `leader` that hold: those of partitions that it leads under the epochs it says, to replicas that take part.
#[must_use]
pub fn alter_isr(image: &Image, leader: i32, changes: &[IsrChange]) -> Vec<MetadataRecord> {
    let holds = |c: &&IsrChange| {
        image.partition(&c.topic, c.partition).is_some_and(|p| {
            p.leader == leader
                && p.leader_epoch == c.leader_epoch
                && p.partition_epoch == c.partition_epoch
                && c.isr.contains(&leader)
                && c.isr.iter().all(|n| p.replicas.contains(n))
                && c.isr.iter().all(|n| p.isr.contains(n) || image.is_active(*n))
        })
    };
    (changes.iter().filter(holds))
        .filter_map(|c| {
            let mut next = image.partition(&c.topic, c.partition)?.clone();
            next.isr.clone_from(&c.isr);
            next.partition_epoch += 1;
            Some(record(c.topic, c.partition, next))
        })
        .collect()
}

/// Partitions whose preferred leader, the first of their replicas, is in sync and takes part but does not lead: it does.
#[must_use]
pub fn elect_preferred(image: &Image, wanted: impl Fn(Uuid, u32) -> bool) -> Vec<MetadataRecord> {
    let mut records = Vec::new();
    for_each_partition(image, |topic, index, partition| {
        let Some(preferred) = partition.replicas.first().copied() else {
            return;
        };
        if partition.leader != preferred
            && partition.isr.contains(&preferred)
            && image.is_active(preferred)
            && wanted(topic, index)
        {
            let mut next = partition.clone();
            next.leader = preferred;
            next.leader_epoch += 1;
            next.partition_epoch += 1;
            records.push(record(topic, index, next));
        }
    });
    records
}

fn for_each_partition(image: &Image, mut visit: impl FnMut(Uuid, u32, &PartitionImage)) {
    for topic in image.topics() {
        for (index, partition) in topic.partitions.iter().enumerate() {
            visit(topic.id, index as u32, partition);
        }
    }
}

fn record(topic: Uuid, partition: u32, image: PartitionImage) -> MetadataRecord {
    MetadataRecord::Partition {
        topic: topic.into_bytes(),
        partition,
        replicas: image.replicas,
        isr: image.isr,
        leader: image.leader,
        leader_epoch: image.leader_epoch,
        partition_epoch: image.partition_epoch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registration(node: i32, directory: u8) -> Registration {
        Registration {
            node,
            incarnation: [0; 16],
            directory: [directory; 16],
            clients: Vec::new(),
            peers: Vec::new(),
            rack: None,
        }
    }

    const TOPIC: Uuid = Uuid::from_u128(9);

    /// Three brokers, and a partition of all three that the first leads, with this ISR.
    fn cluster(isr: &[i32]) -> Image {
        let mut records: Vec<MetadataRecord> = (1..=3)
            .map(|n| MetadataRecord::Broker(registration(n, n as u8)))
            .collect();
        records.push(MetadataRecord::Topic {
            id: TOPIC.into_bytes(),
            name: "t".into(),
        });
        let partition = PartitionImage {
            replicas: vec![1, 2, 3],
            isr: isr.to_vec(),
            leader: 1,
            leader_epoch: 5,
            partition_epoch: 7,
        };
        records.push(record(TOPIC, 0, partition));
        Image::default().apply(&records)
    }

    fn partition(image: &Image) -> PartitionImage {
        image.partition(&TOPIC, 0).expect("there").clone()
    }

    #[test]
    fn a_fenced_leader_is_followed_by_one_in_sync() {
        let image = cluster(&[1, 3]);
        let image = image.apply(&fence(&image, 1));
        let p = partition(&image);
        assert_eq!((p.leader, p.leader_epoch, p.partition_epoch), (3, 6, 8));
        assert_eq!(p.isr, [3]);
        assert!(fence(&image, 1).is_empty(), "once");
        // Its return changes nothing of that, and the last one in sync stays in the ISR when it goes too.
        let image = image.apply(&register(&image, &registration(1, 1)).expect("known"));
        assert_eq!(partition(&image), p);
        let image = image.apply(&fence(&image, 3));
        let p = partition(&image);
        assert_eq!((p.leader, p.isr), (-1, vec![3]), "broker 1 is not in sync");
        let image = image.apply(&register(&image, &registration(3, 3)).expect("known"));
        let p = partition(&image);
        assert_eq!((p.leader, p.leader_epoch), (3, 8));
    }

    #[test]
    fn a_fenced_follower_leaves_the_isr_and_the_leader_stays() {
        let image = cluster(&[1, 2, 3]);
        let p = partition(&image.apply(&fence(&image, 2)));
        assert_eq!((p.leader, p.leader_epoch, p.partition_epoch), (1, 5, 8));
        assert_eq!(p.isr, [1, 3]);
    }

    #[test]
    fn a_started_leader_goes_on_under_a_new_epoch() {
        let image = cluster(&[1, 2]);
        let image = image.apply(&register(&image, &registration(1, 1)).expect("known"));
        let p = partition(&image);
        assert_eq!((p.leader, p.leader_epoch), (1, 6));
    }

    #[test]
    fn an_emptied_folder_is_in_no_isr_and_two_folders_do_not_share_an_id() {
        let image = cluster(&[1]);
        assert!(matches!(
            register(&image, &registration(1, 77)),
            Err(ControllerError::DuplicateBroker { .. })
        ));
        let image = image.apply(&fence(&image, 1));
        let image = image.apply(&register(&image, &registration(1, 77)).expect("the other is gone"));
        let p = partition(&image);
        assert_eq!(
            (p.leader, p.isr),
            (-1, vec![]),
            "nobody hides that its records are lost"
        );
    }

    #[test]
    fn an_isr_changes_only_as_its_leader_says_under_the_epochs_it_says() {
        let image = cluster(&[1, 2]);
        let change = |leader_epoch, partition_epoch, isr: &[i32]| IsrChange {
            topic: TOPIC,
            partition: 0,
            leader_epoch,
            partition_epoch,
            isr: isr.to_vec(),
        };
        let good = change(5, 7, &[1, 2, 3]);
        let next = image.apply(&alter_isr(&image, 1, std::slice::from_ref(&good)));
        assert_eq!(partition(&next).isr, [1, 2, 3]);
        assert!(
            alter_isr(&next, 1, std::slice::from_ref(&good)).is_empty(),
            "the partition epoch has moved"
        );
        for (leader, change) in [
            (2, good.clone()),
            (1, change(4, 7, &[1, 3])),
            (1, change(5, 7, &[2, 3])),
            (1, change(5, 7, &[1, 4])),
        ] {
            assert!(alter_isr(&image, leader, &[change]).is_empty());
        }
        let image = image.apply(&fence(&image, 3));
        assert!(alter_isr(&image, 1, &[good]).is_empty(), "a fenced broker joins no ISR");
    }

    #[test]
    fn a_failed_log_is_given_up_where_others_have_it() {
        let image = cluster(&[1, 2]);
        let next = image.apply(&give_up(&image, 1, &[(TOPIC, 0), (TOPIC, 9)]));
        let p = partition(&next);
        assert_eq!((p.leader, p.leader_epoch, p.isr), (2, 6, vec![2]));
        assert!(give_up(&next, 2, &[(TOPIC, 0)]).is_empty(), "nobody else has it");
        assert!(give_up(&next, 1, &[(TOPIC, 0)]).is_empty(), "once");
    }

    #[test]
    fn the_preferred_leader_leads_again_once_it_is_in_sync() {
        let image = cluster(&[1, 2]);
        let image = image.apply(&fence(&image, 1));
        let image = image.apply(&register(&image, &registration(1, 1)).expect("known"));
        assert!(elect_preferred(&image, |_, _| true).is_empty(), "not in sync");
        let p = partition(&image);
        let change = IsrChange {
            topic: TOPIC,
            partition: 0,
            leader_epoch: p.leader_epoch,
            partition_epoch: p.partition_epoch,
            isr: vec![2, 1],
        };
        let image = image.apply(&alter_isr(&image, 2, &[change]));
        let image = image.apply(&elect_preferred(&image, |_, _| true));
        assert_eq!(partition(&image).leader, 1);
    }
}
