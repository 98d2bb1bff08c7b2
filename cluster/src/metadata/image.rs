//! What the committed records add up to. Nobody edits an image: records make the next one.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use uuid::Uuid;

use super::record::{ConfigResource, Member, MetadataRecord, PartitionImage, Registration};

/// A topic.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TopicImage {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// By index.
    pub partitions: Vec<PartitionImage>,
}

/// A broker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Broker {
    /// As it registered last.
    pub registration: Registration,
    /// Takes no part: leads nothing and joins no ISR.
    pub fenced: bool,
}

/// A topic's name as metric names show it: two topics that are the same there collide.
#[must_use]
pub fn folded(name: &str) -> String {
    name.replace('.', "_")
}

/// The cluster as of some entry of the quorum's log. Clones are cheap enough to make one per change: topics are shared.
#[derive(Clone, Default, Debug)]
pub struct Image {
    /// Number of the last change: the index of its entry in the quorum's log.
    pub version: u64,
    /// Kafka's cluster id; empty until the first leader of the quorum has drawn one.
    pub cluster_id: String,
    /// What all brokers may say and write.
    pub feature_level: u16,
    members: Arc<BTreeMap<i32, Member>>,
    brokers: BTreeMap<i32, Arc<Broker>>,
    names: Arc<BTreeMap<String, Uuid>>,
    /// Topic by its name with '.' and '_' folded into one ([`folded`]).
    folded: Arc<HashMap<String, Uuid>>,
    /// Of all topics.
    partition_count: usize,
    by_id: HashMap<Uuid, Arc<TopicImage>>,
    configs: BTreeMap<ConfigResource, Arc<BTreeMap<String, String>>>,
    /// First producer id not handed out.
    pub next_producer_id: i64,
}

impl Image {
    /// A member of the metadata quorum.
    #[must_use]
    pub fn member(&self, node: i32) -> Option<&Member> {
        self.members.get(&node)
    }

    /// Members of the metadata quorum, by node.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// A broker that has registered.
    #[must_use]
    pub fn broker(&self, node: i32) -> Option<&Broker> {
        self.brokers.get(&node).map(Arc::as_ref)
    }

    /// Brokers that have registered, by id.
    pub fn brokers(&self) -> impl Iterator<Item = &Broker> {
        self.brokers.values().map(Arc::as_ref)
    }

    /// Whether a broker takes part.
    #[must_use]
    pub fn is_active(&self, node: i32) -> bool {
        self.broker(node).is_some_and(|b| !b.fenced)
    }

    /// Ids of the brokers that take part.
    pub fn active(&self) -> impl Iterator<Item = i32> {
        self.brokers.iter().filter(|(_, b)| !b.fenced).map(|(id, _)| *id)
    }

    /// A topic by name.
    #[must_use]
    pub fn topic(&self, name: &str) -> Option<&Arc<TopicImage>> {
        self.by_id.get(self.names.get(name)?)
    }

    /// A topic by id.
    #[must_use]
    pub fn topic_by_id(&self, id: &Uuid) -> Option<&Arc<TopicImage>> {
        self.by_id.get(id)
    }

    /// All topics by name.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<TopicImage>> {
        self.names.values().map(|id| &self.by_id[id])
    }

    /// Topics from `name` on, in order.
    pub fn topics_from<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Arc<TopicImage>> {
        self.names.range(name.to_owned()..).map(|(_, id)| &self.by_id[id])
    }

    /// The topic whose name is the same as this one in metric names, if there is one.
    #[must_use]
    pub fn topic_folded(&self, name: &str) -> Option<&Arc<TopicImage>> {
        self.by_id.get(self.folded.get(&folded(name))?)
    }

    /// Number of partitions of all topics.
    #[must_use]
    pub fn partition_count(&self) -> usize {
        self.partition_count
    }

    /// Number of topics.
    #[must_use]
    pub fn topic_count(&self) -> usize {
        self.names.len()
    }

    /// A partition.
    #[must_use]
    pub fn partition(&self, topic: &Uuid, partition: u32) -> Option<&PartitionImage> {
        self.by_id.get(topic)?.partitions.get(partition as usize)
    }

    /// An entry as it was set, without defaults.
    #[must_use]
    pub fn config(&self, resource: &ConfigResource, name: &str) -> Option<&str> {
        self.configs.get(resource)?.get(name).map(String::as_str)
    }

    /// All entries set on a resource.
    pub fn configs(&self, resource: &ConfigResource) -> impl Iterator<Item = (&str, &str)> {
        self.configs
            .get(resource)
            .into_iter()
            .flat_map(|entries| entries.iter().map(|(k, v)| (k.as_str(), v.as_str())))
    }

    /// The image after more records.
    #[must_use]
    pub fn apply(&self, records: &[MetadataRecord]) -> Self {
        let mut next = self.clone();
        next.extend(records);
        next
    }

    /// Applies more records to an image of one's own: for many changes one after the other, as a clone costs by the number of topics.
    pub fn extend(&mut self, records: &[MetadataRecord]) {
        for record in records {
            self.apply_one(record);
        }
    }

    fn apply_one(&mut self, record: &MetadataRecord) {
        match record {
            MetadataRecord::Topic { id, name } => {
                let id = Uuid::from_bytes(*id);
                Arc::make_mut(&mut self.names).insert(name.clone(), id);
                Arc::make_mut(&mut self.folded).insert(folded(name), id);
                let topic = TopicImage {
                    id,
                    name: name.clone(),
                    partitions: Vec::new(),
                };
                self.by_id.insert(id, Arc::new(topic));
            }
            MetadataRecord::Partition {
                topic,
                partition,
                state,
            } => {
                let Some(topic) = self.by_id.get_mut(&Uuid::from_bytes(*topic)) else {
                    return;
                };
                let topic = Arc::make_mut(topic);
                let index = *partition as usize;
                if index < topic.partitions.len() {
                    topic.partitions[index] = state.clone();
                } else if index == topic.partitions.len() {
                    topic.partitions.push(state.clone());
                    self.partition_count += 1;
                }
                // One that leaves a gap changes nothing, on any member: to end them here would end them again at every replay.
            }
            MetadataRecord::RemoveTopic { id } => {
                if let Some(topic) = self.by_id.remove(&Uuid::from_bytes(*id)) {
                    Arc::make_mut(&mut self.names).remove(&topic.name);
                    Arc::make_mut(&mut self.folded).remove(&folded(&topic.name));
                    self.partition_count -= topic.partitions.len();
                    self.configs.remove(&ConfigResource::Topic(topic.name.clone()));
                }
            }
            MetadataRecord::Config { resource, name, value } => {
                let entries = Arc::make_mut(self.configs.entry(resource.clone()).or_default());
                match value {
                    Some(value) => entries.insert(name.clone(), value.clone()),
                    None => entries.remove(name),
                };
            }
            MetadataRecord::Cluster { id } => self.cluster_id.clone_from(id),
            MetadataRecord::Broker(registration) => {
                let node = registration.node;
                let broker = Broker {
                    registration: registration.clone(),
                    fenced: false,
                };
                self.brokers.insert(node, Arc::new(broker));
                for topic in self.by_id.values_mut() {
                    if topic.partitions.iter().any(|p| p.leader == node) {
                        for partition in Arc::make_mut(topic).partitions.iter_mut().filter(|p| p.leader == node) {
                            partition.leader_epoch += 1;
                            partition.partition_epoch += 1;
                        }
                    }
                }
            }
            MetadataRecord::RemoveBroker { node } => {
                self.brokers.remove(node);
                self.configs.remove(&ConfigResource::Broker(Some(*node)));
            }
            MetadataRecord::Member(member) => {
                Arc::make_mut(&mut self.members).insert(member.node, member.clone());
            }
            MetadataRecord::RemoveMember { node } => {
                Arc::make_mut(&mut self.members).remove(node);
            }
            MetadataRecord::FeatureLevel { level } => self.feature_level = self.feature_level.max(*level),
            MetadataRecord::Fence { node } => {
                if let Some(broker) = self.brokers.get_mut(node) {
                    Arc::make_mut(broker).fenced = true;
                }
            }
            MetadataRecord::ProducerIds { next } => self.next_producer_id = self.next_producer_id.max(*next),
            MetadataRecord::Snapshot => {
                *self = Self {
                    version: self.version,
                    ..Self::default()
                };
            }
        }
    }

    /// Records that make this image out of nothing.
    #[must_use]
    pub fn snapshot(&self) -> Vec<MetadataRecord> {
        let mut records = vec![
            MetadataRecord::Snapshot,
            MetadataRecord::Cluster {
                id: self.cluster_id.clone(),
            },
            MetadataRecord::ProducerIds {
                next: self.next_producer_id,
            },
            MetadataRecord::FeatureLevel {
                level: self.feature_level,
            },
        ];
        records.extend(self.members.values().cloned().map(MetadataRecord::Member));
        // Before the partitions: a registration changes the epochs of those that its broker leads.
        for (node, broker) in &self.brokers {
            records.push(MetadataRecord::Broker(broker.registration.clone()));
            if broker.fenced {
                records.push(MetadataRecord::Fence { node: *node });
            }
        }
        for topic in self.topics() {
            let id = topic.id.into_bytes();
            records.push(MetadataRecord::Topic {
                id,
                name: topic.name.clone(),
            });
            for (index, p) in topic.partitions.iter().enumerate() {
                records.push(MetadataRecord::Partition {
                    topic: id,
                    partition: index as u32,
                    state: p.clone(),
                });
            }
        }
        for (resource, entries) in &self.configs {
            for (name, value) in entries.iter() {
                records.push(MetadataRecord::Config {
                    resource: resource.clone(),
                    name: name.clone(),
                    value: Some(value.clone()),
                });
            }
        }
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::record::{decode, encode};

    fn topic(n: u8, partitions: u32) -> Vec<MetadataRecord> {
        let mut records = vec![MetadataRecord::Topic {
            id: [n; 16],
            name: format!("t{n}"),
        }];
        records.extend((0..partitions).map(|partition| MetadataRecord::Partition {
            topic: [n; 16],
            partition,
            state: PartitionImage::new(vec![1]),
        }));
        records
    }

    fn registration(node: i32) -> Registration {
        Registration {
            node,
            incarnation: [1; 16],
            directory: [2; 16],
            clients: Vec::new(),
            peers: Vec::new(),
            rack: None,
            min_insync: 1,
            start: 1,
            levels: (1, 1),
        }
    }

    #[test]
    fn a_snapshot_makes_the_same_image() {
        let mut records = topic(1, 3);
        records.push(MetadataRecord::Broker(registration(1)));
        records.push(MetadataRecord::Broker(registration(2)));
        records.push(MetadataRecord::Fence { node: 2 });
        records.push(MetadataRecord::Cluster { id: "c".into() });
        records.push(MetadataRecord::Member(Member {
            node: 2,
            directory: [3; 16],
            generation: 1,
            address: "h:1".into(),
            voter: true,
        }));
        records.push(MetadataRecord::FeatureLevel { level: 1 });
        records.extend(topic(2, 1));
        records.push(MetadataRecord::Config {
            resource: ConfigResource::Topic("t1".into()),
            name: "retention.ms".into(),
            value: Some("5".into()),
        });
        records.push(MetadataRecord::RemoveTopic { id: [2; 16] });
        records.push(MetadataRecord::ProducerIds { next: 2000 });
        let image = Image::default().apply(&records);
        let bytes = encode(&image.snapshot());
        let again = Image::default()
            .apply(&topic(9, 1))
            .apply(&decode::<Vec<MetadataRecord>>(&bytes).expect("decodes"));
        assert_eq!(again.snapshot(), image.snapshot());
        assert_eq!(again.topic("t1").expect("kept").partitions.len(), 3);
        assert!(again.topic("t9").is_none() && again.topic("t2").is_none());
    }

    #[test]
    fn a_partition_that_leaves_a_gap_changes_nothing() {
        let image = Image::default().apply(&topic(1, 2));
        let mut gap = topic(1, 9);
        let after = image.apply(&gap.split_off(5));
        assert_eq!(after.topic("t1").expect("there").partitions.len(), 2);
    }

    #[test]
    fn a_started_broker_leads_under_a_new_epoch() {
        let image = Image::default().apply(&topic(1, 2));
        let image = image.apply(&[
            MetadataRecord::Broker(registration(1)),
            MetadataRecord::Broker(registration(2)),
        ]);
        let topic = image.topic("t1").expect("there");
        assert!(topic.partitions.iter().all(|p| p.leader_epoch == 1));
    }

    #[test]
    fn garbage_is_refused() {
        for len in 0..200 {
            assert!(decode::<Vec<MetadataRecord>>(&vec![0xa5; len]).is_err());
        }
    }
}
