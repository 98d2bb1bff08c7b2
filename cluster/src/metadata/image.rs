//! What the committed records add up to. Nobody edits an image: records make the next one.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use uuid::Uuid;

use super::record::{ConfigResource, MetadataRecord};

/// A partition's placement and leadership.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartitionImage {
    /// Preferred leader first.
    pub replicas: Vec<i32>,
    /// In sync.
    pub isr: Vec<i32>,
    /// -1 for none.
    pub leader: i32,
    /// Number of the leadership.
    pub leader_epoch: i32,
    /// Number of the change.
    pub partition_epoch: i32,
}

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

/// The cluster as of some offset of the metadata log. Clones are cheap enough to make one per change: topics are shared.
#[derive(Clone, Default, Debug)]
pub struct Image {
    by_name: BTreeMap<String, Arc<TopicImage>>,
    by_id: HashMap<Uuid, Arc<TopicImage>>,
    configs: BTreeMap<ConfigResource, Arc<BTreeMap<String, String>>>,
    /// First producer id not handed out.
    pub next_producer_id: i64,
}

impl Image {
    /// A topic by name.
    #[must_use]
    pub fn topic(&self, name: &str) -> Option<&Arc<TopicImage>> {
        self.by_name.get(name)
    }

    /// A topic by id.
    #[must_use]
    pub fn topic_by_id(&self, id: &Uuid) -> Option<&Arc<TopicImage>> {
        self.by_id.get(id)
    }

    /// All topics by name.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<TopicImage>> {
        self.by_name.values()
    }

    /// Topics from `name` on, in order.
    pub fn topics_from<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Arc<TopicImage>> {
        self.by_name.range(name.to_owned()..).map(|(_, t)| t)
    }

    /// Number of topics.
    #[must_use]
    pub fn topic_count(&self) -> usize {
        self.by_name.len()
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
        for record in records {
            next.apply_one(record);
        }
        next
    }

    fn put(&mut self, topic: TopicImage) {
        let topic = Arc::new(topic);
        self.by_name.insert(topic.name.clone(), Arc::clone(&topic));
        self.by_id.insert(topic.id, topic);
    }

    fn apply_one(&mut self, record: &MetadataRecord) {
        match record {
            MetadataRecord::Topic { id, name } => self.put(TopicImage {
                id: Uuid::from_bytes(*id),
                name: name.clone(),
                partitions: Vec::new(),
            }),
            MetadataRecord::Partition {
                topic,
                partition,
                replicas,
                isr,
                leader,
                leader_epoch,
                partition_epoch,
            } => {
                let Some(old) = self.by_id.get(&Uuid::from_bytes(*topic)) else {
                    return;
                };
                let mut topic = TopicImage::clone(old);
                let image = PartitionImage {
                    replicas: replicas.clone(),
                    isr: isr.clone(),
                    leader: *leader,
                    leader_epoch: *leader_epoch,
                    partition_epoch: *partition_epoch,
                };
                let index = *partition as usize;
                if index < topic.partitions.len() {
                    topic.partitions[index] = image;
                } else {
                    assert_eq!(index, topic.partitions.len(), "partitions are created in order");
                    topic.partitions.push(image);
                }
                self.put(topic);
            }
            MetadataRecord::RemoveTopic { id } => {
                if let Some(topic) = self.by_id.remove(&Uuid::from_bytes(*id)) {
                    self.by_name.remove(&topic.name);
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
            MetadataRecord::BrokerStarted { node } => {
                let led: Vec<_> = self
                    .by_name
                    .values()
                    .filter(|t| t.partitions.iter().any(|p| p.leader == *node))
                    .cloned()
                    .collect();
                for topic in led {
                    let mut topic = TopicImage::clone(&topic);
                    for partition in topic.partitions.iter_mut().filter(|p| p.leader == *node) {
                        partition.leader_epoch += 1;
                        partition.partition_epoch += 1;
                    }
                    self.put(topic);
                }
            }
            MetadataRecord::ProducerIds { next } => self.next_producer_id = self.next_producer_id.max(*next),
            MetadataRecord::Snapshot => *self = Self::default(),
        }
    }

    /// Records that make this image out of nothing.
    #[must_use]
    pub fn snapshot(&self) -> Vec<MetadataRecord> {
        let mut records = vec![
            MetadataRecord::Snapshot,
            MetadataRecord::ProducerIds {
                next: self.next_producer_id,
            },
        ];
        for topic in self.by_name.values() {
            let id = topic.id.into_bytes();
            records.push(MetadataRecord::Topic {
                id,
                name: topic.name.clone(),
            });
            for (index, p) in topic.partitions.iter().enumerate() {
                records.push(MetadataRecord::Partition {
                    topic: id,
                    partition: index as u32,
                    replicas: p.replicas.clone(),
                    isr: p.isr.clone(),
                    leader: p.leader,
                    leader_epoch: p.leader_epoch,
                    partition_epoch: p.partition_epoch,
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
            replicas: vec![1],
            isr: vec![1],
            leader: 1,
            leader_epoch: 0,
            partition_epoch: 0,
        }));
        records
    }

    #[test]
    fn a_snapshot_makes_the_same_image() {
        let mut records = topic(1, 3);
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
            .apply(&decode(&bytes).expect("decodes"));
        assert_eq!(again.snapshot(), image.snapshot());
        assert_eq!(again.topic("t1").expect("kept").partitions.len(), 3);
        assert!(again.topic("t9").is_none() && again.topic("t2").is_none());
    }

    #[test]
    fn a_started_broker_leads_under_a_new_epoch() {
        let image = Image::default().apply(&topic(1, 2));
        let image = image.apply(&[
            MetadataRecord::BrokerStarted { node: 1 },
            MetadataRecord::BrokerStarted { node: 2 },
        ]);
        let topic = image.topic("t1").expect("there");
        assert!(topic.partitions.iter().all(|p| p.leader_epoch == 1));
    }

    #[test]
    fn garbage_is_refused() {
        for len in 0..200 {
            assert!(decode(&vec![0xa5; len]).is_err());
        }
    }
}
