//! Topics: creation, deletion, growth.

use uuid::Uuid;

use super::{
    ControllerError, PARTITIONS_MAX,
    configs::Registry,
    placement::{Place, spread},
    size,
};
use crate::metadata::{ConfigResource, Image, MetadataRecord, PartitionImage};

/// A topic to be created.
#[derive(Clone, Debug)]
pub struct NewTopic {
    /// Its name.
    pub name: String,
    /// -1 for the broker's default.
    pub partitions: i32,
    /// -1 for the broker's default.
    pub replication_factor: i16,
    /// Replicas of each partition by index, instead of the two counts.
    pub assignments: Vec<(i32, Vec<i32>)>,
    /// Entries of its configuration.
    pub configs: Vec<(String, Option<String>)>,
}

/// What the controller needs to know of the cluster beside the image.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// Brokers that take new replicas: registered, fenced or not, and not being drained.
    pub brokers: Vec<Place>,
    /// Brokers that are being drained, and take none.
    pub draining: Vec<i32>,
    /// `num.partitions`.
    pub partitions: i32,
    /// `default.replication.factor`.
    pub replication_factor: i16,
}

/// The metadata log's name in Kafka: clients would take a topic of that name for it.
const METADATA_TOPIC: &str = "__cluster_metadata";

/// Kafka's rules for names: 1 to 249 of `[a-zA-Z0-9._-]`, not `.` or `..`, and not the metadata log's.
///
/// # Errors
/// [`ControllerError::InvalidTopic`] with the rule.
pub fn check_name(name: &str) -> Result<(), ControllerError> {
    let reason = if name.is_empty() {
        "the empty string is not allowed"
    } else if name == "." || name == ".." {
        "'.' and '..' are not allowed"
    } else if name == METADATA_TOPIC {
        "the name is reserved for the cluster's metadata log"
    } else if name.len() > 249 {
        "it is longer than 249 characters"
    } else if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    {
        "only ASCII letters, digits, '.', '_' and '-' are allowed"
    } else {
        return Ok(());
    };
    Err(ControllerError::InvalidTopic {
        name: name.into(),
        reason,
    })
}

fn partition_record(topic: Uuid, partition: u32, replicas: Vec<i32>, brokers: &[Place]) -> MetadataRecord {
    let is_active = |n: i32| brokers.iter().any(|p| p.node == n && p.active);
    MetadataRecord::Partition {
        topic: topic.into_bytes(),
        partition,
        state: PartitionImage::new_among(replicas, is_active),
    }
}

/// Which brokers are being drained: that may be why others are missing.
fn draining_note(draining: &[i32]) -> String {
    let each = draining.iter().map(|n| {
        format!(" Broker {n} is being drained and takes no replicas; `millrace cluster drain {n} --undo` ends that.")
    });
    each.collect()
}

fn check_factor(factor: usize, defaults: &Defaults) -> Result<(), ControllerError> {
    let brokers = &defaults.brokers;
    if factor > brokers.len() || !brokers.iter().any(|p| p.active) {
        let active = brokers.iter().filter(|p| p.active).count();
        return Err(ControllerError::InvalidReplicationFactor {
            reason: format!(
                "Unable to replicate the partition {factor} time(s): The target replication factor of {factor} \
                 cannot be reached because only {} broker(s) are registered, {active} of them active.{}",
                brokers.len(),
                draining_note(&defaults.draining)
            ),
        });
    }
    Ok(())
}

fn check_room(image: &Image, more: usize) -> Result<(), ControllerError> {
    if image.partition_count() + more > PARTITIONS_MAX {
        return Err(ControllerError::PolicyViolation {
            reason: format!("{more} more partitions would exceed this cluster's limit of {PARTITIONS_MAX}"),
        });
    }
    Ok(())
}

fn check_assignment(assignments: &[(i32, Vec<i32>)], first: i32, defaults: &Defaults) -> Result<(), ControllerError> {
    let brokers = &defaults.brokers;
    let bad = |reason: String| Err(ControllerError::InvalidReplicaAssignment { reason });
    let mut indexes: Vec<i32> = assignments.iter().map(|(i, _)| *i).collect();
    indexes.sort_unstable();
    if indexes.iter().zip(first..).any(|(have, due)| *have != due) {
        return bad("partitions must be numbered consecutively, each once".into());
    }
    let width = assignments.first().map_or(0, |(_, r)| r.len());
    for (index, replicas) in assignments {
        if replicas.is_empty() || replicas.len() != width {
            return bad(format!(
                "partition {index} has {} replicas, the others {width}",
                replicas.len()
            ));
        }
        let mut unique = replicas.clone();
        unique.sort_unstable();
        unique.dedup();
        if unique.len() != replicas.len() {
            return bad(format!("partition {index} names a broker twice"));
        }
        if let Some(unknown) = replicas.iter().find(|b| !brokers.iter().any(|p| p.node == **b)) {
            let why = match defaults.draining.contains(unknown) {
                true => draining_note(&[*unknown]),
                false => String::new(),
            };
            return bad(format!(
                "partition {index} names broker {unknown}, which is not among those that take replicas.{why}"
            ));
        }
        if !replicas
            .iter()
            .any(|b| brokers.iter().any(|p| p.node == *b && p.active))
        {
            return bad(format!(
                "partition {index} names only brokers that are fenced: one at least has to take part now"
            ));
        }
    }
    Ok(())
}

/// Creates a topic under `id`, which the caller drew.
///
/// # Errors
/// [`ControllerError`].
pub fn create(
    image: &Image,
    defaults: &Defaults,
    registry: &dyn Registry,
    topic: &NewTopic,
    id: Uuid,
) -> Result<Vec<MetadataRecord>, ControllerError> {
    check_name(&topic.name)?;
    if image.topic(&topic.name).is_some() {
        return Err(ControllerError::TopicExists {
            name: topic.name.clone(),
        });
    }
    // Metric names put '.' and '_' into one; Kafka refuses topics that would collide there.
    if let Some(other) = image.topic_folded(&topic.name) {
        return Err(ControllerError::InvalidTopic {
            name: format!("{}' collides with '{}", topic.name, other.name),
            reason: "'.' and '_' are the same in metric names",
        });
    }
    let assigned: Vec<Vec<i32>> = if topic.assignments.is_empty() {
        let count = if topic.partitions == -1 {
            defaults.partitions
        } else {
            topic.partitions
        };
        let factor = if topic.replication_factor == -1 {
            defaults.replication_factor
        } else {
            topic.replication_factor
        };
        let count =
            usize::try_from(count)
                .ok()
                .filter(|n| *n > 0)
                .ok_or_else(|| ControllerError::InvalidPartitions {
                    reason: "Number of partitions was set to an invalid non-positive value.".into(),
                })?;
        let factor = usize::try_from(factor).ok().filter(|n| *n > 0).ok_or_else(|| {
            ControllerError::InvalidReplicationFactor {
                reason: "Replication factor must be larger than 0.".into(),
            }
        })?;
        check_factor(factor, defaults)?;
        check_room(image, count)?;
        // Each topic begins at another broker, so that small topics spread too.
        spread(&defaults.brokers, image.topic_count(), count, factor)
    } else {
        if topic.partitions != -1 || topic.replication_factor != -1 {
            return Err(ControllerError::InvalidRequest {
                reason: "A manual partition assignment was specified, but partitions or replication factor was not set to -1.".into(),
            });
        }
        check_assignment(&topic.assignments, 0, defaults)?;
        check_room(image, topic.assignments.len())?;
        let mut sorted = topic.assignments.clone();
        sorted.sort_by_key(|(i, _)| *i);
        sorted.into_iter().map(|(_, r)| r).collect()
    };
    let mut records = vec![MetadataRecord::Topic {
        id: id.into_bytes(),
        name: topic.name.clone(),
    }];
    records.extend(
        assigned
            .into_iter()
            .enumerate()
            .map(|(i, replicas)| partition_record(id, i as u32, replicas, &defaults.brokers)),
    );
    for (name, value) in &topic.configs {
        let Some(value) = value else {
            return Err(ControllerError::InvalidConfig {
                reason: format!("Null value not supported for topic configs: {name}"),
            });
        };
        size::check_value(name, value)?;
        let value = registry.read_topic(name, value)?;
        records.push(MetadataRecord::Config {
            resource: ConfigResource::Topic(topic.name.clone()),
            name: name.clone(),
            value: Some(value),
        });
    }
    size::check(&records)?;
    Ok(records)
}

/// Deletes a topic.
#[must_use]
pub fn delete(id: Uuid) -> Vec<MetadataRecord> {
    vec![MetadataRecord::RemoveTopic { id: id.into_bytes() }]
}

/// Grows a topic to `count` partitions, with `assignments` (of the new ones, in order) or round robin.
///
/// # Errors
/// [`ControllerError`].
pub fn grow(
    image: &Image,
    defaults: &Defaults,
    name: &str,
    count: i32,
    assignments: Option<&[Vec<i32>]>,
) -> Result<Vec<MetadataRecord>, ControllerError> {
    let topic = image.topic(name).ok_or(ControllerError::UnknownTopic)?;
    let have = topic.partitions.len();
    let want = usize::try_from(count).unwrap_or(0);
    if want == have {
        return Err(ControllerError::InvalidPartitions {
            reason: format!("Topic already has {have} partition(s)."),
        });
    }
    if want < have {
        return Err(ControllerError::InvalidPartitions {
            reason: format!("The topic {name} currently has {have} partition(s); {count} would not be an increase."),
        });
    }
    check_room(image, want - have)?;
    let new: Vec<Vec<i32>> = match assignments {
        Some(given) => {
            if given.len() != want - have {
                return Err(ControllerError::InvalidReplicaAssignment {
                    reason: format!("{} partitions are added but {} assigned", want - have, given.len()),
                });
            }
            let numbered: Vec<_> = (have as i32..).zip(given.iter().cloned()).collect();
            check_assignment(&numbered, have as i32, defaults)?;
            given.to_vec()
        }
        None => {
            let factor = super::reassign::target(&topic.partitions[0]).len();
            check_factor(factor, defaults)?;
            spread(&defaults.brokers, have, want - have, factor)
        }
    };
    Ok(new
        .into_iter()
        .enumerate()
        .map(|(i, replicas)| partition_record(topic.id, (have + i) as u32, replicas, &defaults.brokers))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct AnyConfig;
    impl Registry for AnyConfig {
        fn read_topic(&self, _: &str, value: &str) -> Result<String, ControllerError> {
            Ok(value.to_owned())
        }
        fn read_broker(&self, _: &str, value: &str) -> Result<String, ControllerError> {
            Ok(value.to_owned())
        }
        fn topic_list_default(&self, _: &str) -> Option<String> {
            None
        }
    }

    fn new_topic(name: &str, partitions: i32, replication_factor: i16) -> NewTopic {
        NewTopic {
            name: name.into(),
            partitions,
            replication_factor,
            assignments: Vec::new(),
            configs: Vec::new(),
        }
    }

    fn place(node: i32, active: bool) -> Place {
        Place {
            node,
            rack: None,
            active,
        }
    }

    fn defaults() -> Defaults {
        Defaults {
            brokers: vec![place(4, true)],
            draining: Vec::new(),
            partitions: 3,
            replication_factor: 1,
        }
    }

    #[test]
    fn names_follow_kafkas_rules() {
        for (name, ok) in [
            ("a", true),
            ("a.b_c-1", true),
            ("", false),
            (".", false),
            ("..", false),
            ("a b", false),
            ("ä", false),
            ("a/b", false),
            ("__cluster_metadata", false),
        ] {
            assert_eq!(check_name(name).is_ok(), ok, "{name:?}");
        }
        assert!(check_name(&"x".repeat(249)).is_ok());
        assert!(check_name(&"x".repeat(250)).is_err());
    }

    #[test]
    fn counts_are_checked() {
        let image = Image::default();
        let make = |t: NewTopic| create(&image, &defaults(), &AnyConfig, &t, Uuid::from_u128(1));
        assert_eq!(make(new_topic("t", -1, -1)).expect("defaults").len(), 4);
        assert!(matches!(
            make(new_topic("t", 0, 1)),
            Err(ControllerError::InvalidPartitions { .. })
        ));
        assert!(matches!(
            make(new_topic("t", 1, 2)),
            Err(ControllerError::InvalidReplicationFactor { .. })
        ));
        assert!(matches!(
            make(new_topic("t", 1 << 20, 1)),
            Err(ControllerError::PolicyViolation { .. })
        ));
        let mut manual = new_topic("t", -1, -1);
        manual.assignments = vec![(0, vec![9])];
        assert!(matches!(
            make(manual),
            Err(ControllerError::InvalidReplicaAssignment { .. })
        ));
    }

    #[test]
    fn replicas_are_placed_on_brokers_that_are_away_but_not_in_the_isr() {
        let of = |places: Vec<Place>| Defaults {
            brokers: places,
            replication_factor: 3,
            ..defaults()
        };
        let image = Image::default();
        let make = |defaults: &Defaults, t: &NewTopic| create(&image, defaults, &AnyConfig, t, Uuid::from_u128(1));
        let one_away = of(vec![place(1, true), place(2, false), place(3, true)]);
        let made = image.apply(&make(&one_away, &new_topic("t", 6, -1)).expect("one of three may be away"));
        for partition in &made.topic("t").expect("there").partitions {
            let mut replicas = partition.replicas.clone();
            replicas.sort_unstable();
            assert_eq!(replicas, [1, 2, 3]);
            assert!(!partition.isr.contains(&2) && partition.isr.len() == 2);
            assert_eq!(partition.leader, partition.replicas[0]);
        }
        let grown = made.apply(&grow(&made, &one_away, "t", 7, None).expect("so may it when a topic grows"));
        assert_eq!(grown.topic("t").expect("there").partitions[6].replicas.len(), 3);
        let mut manual = new_topic("t", -1, -1);
        manual.assignments = vec![(0, vec![2, 1])];
        let by_hand = image.apply(&make(&one_away, &manual).expect("one is there"));
        let partition = &by_hand.topic("t").expect("there").partitions[0];
        assert_eq!((partition.leader, partition.isr.as_slice()), (1, &[1][..]));
        manual.assignments = vec![(0, vec![2])];
        assert!(make(&one_away, &manual).is_err(), "nobody could lead it");
        let none = of(vec![place(1, false), place(2, false), place(3, false)]);
        assert!(make(&none, &new_topic("t", 1, -1)).is_err());
        let drained = Defaults {
            draining: vec![3],
            ..of(vec![place(1, true), place(2, true)])
        };
        let refused = make(&drained, &new_topic("t", 1, -1)).expect_err("two do not suffice");
        assert!(refused.to_string().contains("drain 3 --undo"), "{refused}");
    }

    #[test]
    fn a_topic_grows_and_never_shrinks() {
        let records = create(
            &Image::default(),
            &defaults(),
            &AnyConfig,
            &new_topic("t", 2, 1),
            Uuid::from_u128(1),
        );
        let image = Image::default().apply(&records.expect("valid"));
        let grown = image.apply(&grow(&image, &defaults(), "t", 5, None).expect("more"));
        assert_eq!(grown.topic("t").expect("there").partitions.len(), 5);
        assert!(grow(&grown, &defaults(), "t", 5, None).is_err());
        assert!(grow(&grown, &defaults(), "t", 4, None).is_err());
        assert_eq!(
            grow(&grown, &defaults(), "u", 4, None),
            Err(ControllerError::UnknownTopic)
        );
    }
}
