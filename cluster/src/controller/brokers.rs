//! Brokers: registration, fencing, and who leads what because of it (KIP-631, KIP-497, KIP-966).

use uuid::Uuid;

use super::{ControllerError, leadership::Change};
use crate::metadata::{Image, MetadataRecord, PartitionImage, Registration, TopicImage};

/// A broker registers.
///
/// What it led it leads on, under a new epoch; partitions that have no leader and find it in sync, or eligible, are led by it.
///
/// # Errors
/// [`ControllerError::DuplicateBroker`] if it is not on the folder that the cluster knows, or on an old copy of it;
/// [`ControllerError::UnsupportedVersion`] if its build cannot act on what the cluster has agreed on.
pub fn register(image: &Image, registration: &Registration) -> Result<Vec<MetadataRecord>, ControllerError> {
    let node = registration.node;
    let duplicate = |reason: String| Err(ControllerError::DuplicateBroker { reason });
    if let Some(member) = image.member(node)
        && member.directory != registration.directory
    {
        return duplicate(format!(
            "node.id {node} has joined the cluster with another data folder since; empty this one, or give it an id of its own"
        ));
    }
    if let Some(known) = image.broker(node).map(|b| &b.registration)
        && known.directory == registration.directory
        && (known.start > registration.start
            || known.start == registration.start && known.incarnation != registration.incarnation)
    {
        return duplicate(format!(
            "the data folder of node {node} is an old copy: the cluster remembers its start number {}, this is number {}. Empty the \
             folder and start again: what it lacks will be copied to it",
            known.start, registration.start
        ));
    }
    let (lowest, highest) = registration.levels;
    if !(lowest..=highest).contains(&image.feature_level) {
        return Err(ControllerError::UnsupportedVersion {
            reason: format!(
                "the cluster is at feature level {}, this build acts on levels {lowest} to {highest}: use a release that knows it",
                image.feature_level
            ),
        });
    }
    let mut records = vec![MetadataRecord::Broker(registration.clone())];
    // What it leads it leads on under a new epoch, and by its own settings.
    let after = image.apply(&records);
    let may_lead = |n: i32| after.is_active(n);
    records.extend(change_each(&after, all, may_lead, |change| match change.next.leader {
        -1 => change.elect(),
        _ => change.settle(),
    }));
    Ok(records)
}

/// A broker does not answer, or is about to stop: others lead what it led, and it leaves every ISR that others are in. It takes part until
/// the last of these records, so that they may be made in parts.
#[must_use]
pub fn fence(image: &Image, node: i32) -> Vec<MetadataRecord> {
    if !image.is_active(node) {
        return Vec::new();
    }
    let may_lead = |n: i32| n != node && image.is_active(n);
    let mut records = change_each(image, all, may_lead, |change| change.leave(node));
    records.push(MetadataRecord::Fence { node });
    records
}

/// A broker has lost all that it held.
#[must_use]
pub fn emptied(image: &Image, node: i32) -> Vec<MetadataRecord> {
    let may_lead = |n: i32| n != node && image.is_active(n);
    change_each(image, all, may_lead, |change| {
        if change.next.isr.contains(&node) || change.next.elr.contains(&node) {
            change.forget(node);
        }
    })
}

/// A broker that is gone for good is forgotten.
///
/// # Errors
/// [`ControllerError`] if there is none, if it still takes part, or if anything still counts on it.
pub fn unregister(image: &Image, node: i32) -> Result<Vec<MetadataRecord>, ControllerError> {
    let refused = |reason: String| Err(ControllerError::InvalidRequest { reason });
    if image.broker(node).is_none() && image.member(node).is_none() {
        return Err(ControllerError::UnknownBroker { node });
    }
    let held = (image.topics().flat_map(|t| &t.partitions))
        .filter(|p| p.replicas.contains(&node))
        .count();
    if held > 0 {
        return refused(format!(
            "broker {node} is a replica of {held} partitions: move them away first, with `millrace cluster drain {node}`"
        ));
    }
    if image.is_active(node) {
        return refused(format!("broker {node} takes part: stop it first"));
    }
    if image.member(node).is_some_and(|m| m.voter) {
        return refused(format!(
            "node {node} is a voter of the metadata quorum: `millrace cluster remove-node {node}` ends that first"
        ));
    }
    Ok(vec![
        MetadataRecord::RemoveBroker { node },
        MetadataRecord::RemoveMember { node },
    ])
}

/// A broker's logs of some partitions have failed: it leaves their ISRs, and others lead what it led. Where nobody else is in sync
/// it stays: what it has can still be read.
#[must_use]
pub fn give_up(image: &Image, node: i32, partitions: &[(Uuid, u32)]) -> Vec<MetadataRecord> {
    let mut records = Vec::new();
    for (topic, index) in partitions {
        let Some((topic, partition)) = find(image, topic, *index) else {
            continue;
        };
        let others = (partition.isr.iter()).any(|n| *n != node && image.is_active(*n));
        if !partition.isr.contains(&node) || !others {
            continue;
        }
        let mut change = Change::new(image, topic, partition, |n| n != node && image.is_active(n));
        change.leave(node);
        // Its log has failed: it may lack what it would be eligible for.
        change.next.elr.retain(|n| *n != node);
        records.extend(record(topic, *index, partition, change.next));
    }
    records
}

/// A broker that leads a partition leads it under a new epoch: whatever it sent under the one before means nothing any more.
#[must_use]
pub fn lead_anew(image: &Image, node: i32, topic: Uuid, index: u32) -> Vec<MetadataRecord> {
    let Some((topic, partition)) = find(image, &topic, index).filter(|(_, p)| p.leader == node) else {
        return Vec::new();
    };
    let mut change = Change::new(image, topic, partition, |n| image.is_active(n));
    change.lead(node);
    record(topic, index, partition, change.next).into_iter().collect()
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
    let mut records = Vec::new();
    for wish in changes {
        let Some((topic, p)) = find(image, &wish.topic, wish.partition) else {
            continue;
        };
        let holds = p.leader == leader
            && p.leader_epoch == wish.leader_epoch
            && p.partition_epoch == wish.partition_epoch
            && wish.isr.contains(&leader)
            && wish.isr.iter().all(|n| p.replicas.contains(n))
            && wish.isr.iter().all(|n| p.isr.contains(n) || image.is_active(*n));
        if holds {
            let mut change = Change::new(image, topic, p, |n| image.is_active(n));
            change.set_isr(wish.isr.clone());
            change.complete_reassignment();
            records.extend(record(topic, wish.partition, p, change.next));
        }
    }
    records
}

/// Partitions whose preferred leader, the first of their replicas, is in sync and takes part but does not lead: it does.
#[must_use]
pub fn elect_preferred(image: &Image, wanted: impl Fn(Uuid, u32) -> bool) -> Vec<MetadataRecord> {
    let wanted = |t: &TopicImage, index| wanted(t.id, index);
    let may_lead = |n: i32| image.is_active(n);
    change_each(image, wanted, may_lead, |change| {
        let p = &change.next;
        if let Some(preferred) = p.replicas.first().copied()
            && p.leader != preferred
            && p.isr.contains(&preferred)
            && may_lead(preferred)
        {
            change.lead(preferred);
        }
    })
}

/// Partitions without a leader: any replica that takes part leads, whatever it lacks (KIP-460).
#[must_use]
pub fn elect_unclean(image: &Image, wanted: impl Fn(Uuid, u32) -> bool) -> Vec<MetadataRecord> {
    let wanted = |t: &TopicImage, index| wanted(t.id, index);
    let may_lead = |n: i32| image.is_active(n);
    change_each(image, wanted, may_lead, |change| {
        if change.next.leader != -1 {
            return;
        }
        change.elect();
        let any = change.next.replicas.iter().copied().find(|n| may_lead(*n));
        if let (-1, Some(any)) = (change.next.leader, any) {
            change.lead(any);
        }
    })
}

/// After a change of configurations: where the ISR is large enough by now, nobody else is eligible, and where any replica may
/// lead by now, one does.
#[must_use]
pub fn settle(image: &Image, concerned: impl Fn(&TopicImage) -> bool) -> Vec<MetadataRecord> {
    let may_lead = |n: i32| image.is_active(n);
    change_each(
        image,
        |t, _| concerned(t),
        may_lead,
        |change| {
            change.settle();
            if change.next.leader == -1 {
                change.elect();
            }
        },
    )
}

fn all(_: &TopicImage, _: u32) -> bool {
    true
}

pub(super) fn find<'a>(image: &'a Image, topic: &Uuid, index: u32) -> Option<(&'a TopicImage, &'a PartitionImage)> {
    let topic = image.topic_by_id(topic)?;
    Some((topic, topic.partitions.get(index as usize)?))
}

/// The records of what `make` changes of the partitions that are `wanted`.
fn change_each<A: Fn(i32) -> bool + Copy>(
    image: &Image,
    wanted: impl Fn(&TopicImage, u32) -> bool,
    may_lead: A,
    mut make: impl FnMut(&mut Change<'_, A>),
) -> Vec<MetadataRecord> {
    let mut records = Vec::new();
    for topic in image.topics() {
        for (partition, index) in topic
            .partitions
            .iter()
            .zip(0..)
            .filter(|(_, index)| wanted(topic, *index))
        {
            let mut change = Change::new(image, topic, partition, may_lead);
            make(&mut change);
            records.extend(record(topic, index, partition, change.next));
        }
    }
    records
}

/// The record of a change, if it is one.
pub(super) fn record(
    topic: &TopicImage,
    partition: u32,
    before: &PartitionImage,
    mut state: PartitionImage,
) -> Option<MetadataRecord> {
    if state == *before {
        return None;
    }
    state.partition_epoch = before.partition_epoch + 1;
    Some(MetadataRecord::Partition {
        topic: topic.id.into_bytes(),
        partition,
        state,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{controller::leadership::MIN_INSYNC, metadata::ConfigResource};

    pub(in super::super) const TOPIC: Uuid = Uuid::from_u128(9);

    pub(in super::super) fn registration(node: i32, directory: u8) -> Registration {
        Registration {
            node,
            incarnation: [0; 16],
            directory: [directory; 16],
            clients: Vec::new(),
            peers: Vec::new(),
            rack: None,
            min_insync: 1,
            start: 1,
            levels: (0, 1),
        }
    }

    /// Three brokers, and a partition of all three that the first leads, with this ISR.
    pub(in super::super) fn cluster(isr: &[i32]) -> Image {
        cluster_of(3, isr)
    }

    /// So many brokers, and a partition of the first three.
    pub(in super::super) fn cluster_of(brokers: i32, isr: &[i32]) -> Image {
        let mut records: Vec<MetadataRecord> = (1..=brokers)
            .map(|n| MetadataRecord::Broker(registration(n, n as u8)))
            .collect();
        records.push(MetadataRecord::Topic {
            id: TOPIC.into_bytes(),
            name: "t".into(),
        });
        records.push(MetadataRecord::Partition {
            topic: TOPIC.into_bytes(),
            partition: 0,
            state: PartitionImage {
                isr: isr.to_vec(),
                leader: 1,
                leader_epoch: 5,
                partition_epoch: 7,
                ..PartitionImage::new(vec![1, 2, 3])
            },
        });
        Image::default().apply(&records)
    }

    fn at_least_two(image: &Image) -> Image {
        image.apply(&[MetadataRecord::Config {
            resource: ConfigResource::Topic("t".into()),
            name: MIN_INSYNC.into(),
            value: Some("2".into()),
        }])
    }

    pub(in super::super) fn partition(image: &Image) -> PartitionImage {
        image.partition(&TOPIC, 0).expect("there").clone()
    }

    #[test]
    fn who_left_an_isr_that_is_too_small_since_is_eligible_and_leads_if_nobody_else_can() {
        let image = at_least_two(&cluster(&[1, 2, 3]));
        let image = image.apply(&fence(&image, 3));
        let p = partition(&image);
        assert_eq!(
            (p.isr, p.elr),
            (vec![1, 2], vec![]),
            "two are enough to go on without it"
        );
        let image = image.apply(&fence(&image, 2));
        let p = partition(&image);
        assert_eq!((p.isr, p.elr), (vec![1], vec![2]));
        let image = image.apply(&register(&image, &registration(2, 2)).expect("known"));
        let image = image.apply(&register(&image, &registration(3, 3)).expect("known"));
        assert_eq!(partition(&image).leader, 1);
        let alone = image.apply(&fence(&image, 1));
        let p = partition(&alone);
        assert_eq!(
            (p.leader, p.isr, p.elr),
            (2, vec![2], vec![1]),
            "and never 3, which lacks some"
        );
        // Once enough are in sync again nobody else is eligible.
        let p = partition(&alone);
        let grown = IsrChange {
            topic: TOPIC,
            partition: 0,
            leader_epoch: p.leader_epoch,
            partition_epoch: p.partition_epoch,
            isr: vec![2, 3],
        };
        let p = partition(&alone.apply(&alter_isr(&alone, 2, &[grown])));
        assert_eq!((p.isr, p.elr), (vec![2, 3], vec![]));
        // A smaller minimum lets the high watermark go on without those that were eligible.
        let lower = image.apply(&[MetadataRecord::Config {
            resource: ConfigResource::Topic("t".into()),
            name: MIN_INSYNC.into(),
            value: Some("1".into()),
        }]);
        assert!(partition(&lower.apply(&settle(&lower, |_| true))).elr.is_empty());
    }

    #[test]
    fn an_emptied_broker_is_eligible_for_nothing() {
        let image = at_least_two(&cluster(&[1]));
        let image = image.apply(&fence(&image, 1));
        assert_eq!(partition(&image).leader, -1);
        let image = image.apply(&emptied(&image, 1));
        let p = partition(&image);
        assert_eq!(
            (p.leader, p.isr, p.elr),
            (-1, vec![], vec![]),
            "nobody hides that its records are lost"
        );
        let image = image.apply(&elect_unclean(&image, |_, _| true));
        let p = partition(&image);
        assert_eq!((p.leader, p.isr), (2, vec![2]), "unless he is told to");
    }

    #[test]
    fn an_old_copy_of_a_folder_is_refused_and_so_is_a_build_that_does_not_know_the_level() {
        let image = cluster(&[1]);
        let start = |start, incarnation| Registration {
            start,
            incarnation: [incarnation; 16],
            ..registration(1, 1)
        };
        let image = image.apply(&register(&image, &start(4, 4)).expect("a later start"));
        for (number, incarnation, good) in [(3, 3, false), (4, 9, false), (4, 4, true), (5, 5, true)] {
            let done = register(&image, &start(number, incarnation));
            assert_eq!(done.is_ok(), good, "{number} {incarnation}");
        }
        let image = image.apply(&[MetadataRecord::FeatureLevel { level: 2 }]);
        assert!(matches!(
            register(&image, &start(5, 5)),
            Err(ControllerError::UnsupportedVersion { .. })
        ));
    }

    #[test]
    fn a_broker_is_forgotten_once_nothing_counts_on_it() {
        let image = cluster_of(4, &[1]);
        assert!(unregister(&image, 9).is_err());
        assert!(unregister(&image, 1).is_err(), "it has replicas");
        assert!(unregister(&image, 4).is_err(), "it takes part");
        let image = image.apply(&fence(&image, 4));
        let image = image.apply(&unregister(&image, 4).expect("gone"));
        assert!(image.broker(4).is_none());
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
