//! Where clients connect. Ordinarily that is one address, served by every core. With `core.endpoints` each core is told to
//! clients as a broker of its own, with its own port: a client then connects straight to the core that owns a partition, as
//! it connects to a partition's leader anywhere, and its requests cross between cores no more.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use kafka_protocol::messages::BrokerId;
use millrace_cluster::metadata::{Broker, Image, Registration};
use millrace_engine::PartitionKey;
use uuid::Uuid;

use crate::node::View;

/// Distance between the broker ids of a node's cores; node ids stay below it.
const ID_STEP: i32 = 100_000;

/// The node that a broker id means: the node's own, or that of one of its cores. Any other id stays what it is.
#[must_use]
pub fn node_of(id: i32, is_node: impl Fn(i32) -> bool) -> i32 {
    let node = id % ID_STEP;
    if !is_node(id) && is_node(node) { node } else { id }
}

/// The nodes that a request names by broker ids.
#[must_use]
pub fn nodes_of(image: &Image, ids: &[BrokerId]) -> Vec<i32> {
    let one = |id: &BrokerId| node_of(id.0, |n| image.broker(n).is_some());
    ids.iter().map(one).collect()
}

/// What a client is told of a broker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Broker id.
    pub id: i32,
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// The endpoints of this node.
#[derive(Clone, Default, Debug)]
pub struct Endpoints {
    node_id: i32,
    /// One, or one for each core in order.
    list: Vec<Endpoint>,
}

impl Endpoints {
    /// One address for all cores.
    #[must_use]
    pub fn one(node_id: i32, host: String, port: u16) -> Self {
        let id = node_id;
        Self {
            node_id,
            list: vec![Endpoint { id, host, port }],
        }
    }

    /// A port for each core. The first core, where the coordinator is, has the node's id.
    #[must_use]
    pub fn per_core(node_id: i32, host: &str, ports: &[u16]) -> Self {
        let endpoint = |(core, port): (usize, &u16)| Endpoint {
            id: node_id + ID_STEP * core as i32,
            host: host.to_owned(),
            port: *port,
        };
        Self {
            node_id,
            list: ports.iter().enumerate().map(endpoint).collect(),
        }
    }

    /// Why the cores of a node cannot have ids of their own, if they cannot.
    #[must_use]
    pub fn refuse_ids(node_id: i32, cores: usize) -> Option<String> {
        let last = i64::from(node_id) + i64::from(ID_STEP) * cores as i64;
        (node_id >= ID_STEP || last > i64::from(i32::MAX)).then(|| {
            format!("core.endpoints gives core c the broker id node.id + {ID_STEP} * c: node.id must be below {ID_STEP}, it is {node_id}")
        })
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> &[Endpoint] {
        &self.list
    }

    /// Those of the brokers that `tell` picks, with their racks: this node's as they are, others' as they registered.
    #[must_use]
    pub fn of_cluster(&self, image: &Image, tell: impl Fn(&Broker) -> bool) -> Vec<(Endpoint, Option<String>)> {
        let mut all = Vec::new();
        for broker in image.brokers() {
            let registration = &broker.registration;
            if registration.node == self.node_id {
                let rack = &registration.rack;
                all.extend(self.list.iter().map(|e| (e.clone(), rack.clone())));
            } else if tell(broker) {
                all.extend(registered(registration).map(|e| (e, registration.rack.clone())));
            }
        }
        all
    }

    /// Where a node is reached that need not be this one, while it takes part.
    #[must_use]
    pub fn of_node(&self, image: &Image, node: i32) -> Option<Endpoint> {
        if node == self.node_id {
            return self.list.first().cloned();
        }
        let broker = image.broker(node).filter(|b| !b.fenced)?;
        registered(&broker.registration).next()
    }

    /// Where the controller and the group coordinator are.
    ///
    /// # Panics
    /// Before the node listens.
    #[must_use]
    pub fn coordinator(&self) -> &Endpoint {
        self.list.first().expect("clients come when the node listens")
    }

    /// Whether a broker id means this node.
    #[must_use]
    pub fn is_ours(&self, id: i32) -> bool {
        self.list.iter().any(|e| e.id == id)
    }

    /// For one partition: the broker that clients are told for a node that leads it or holds a replica of it.
    pub fn naming<'a>(&'a self, view: &View, topic: Uuid, partition: u32) -> impl Fn(&i32) -> BrokerId + use<'a> {
        let key = PartitionKey { topic, partition };
        let core = || {
            view.placement
                .get(&key)
                .and_then(|shard| self.list.get(*shard as usize))
        };
        let ours = (self.list.len() > 1)
            .then(core)
            .flatten()
            .map_or(self.node_id, |e| e.id);
        move |node| BrokerId(if *node == self.node_id { ours } else { *node })
    }
}

/// For how long clients are still told of a broker that takes part no more: as long as librdkafka takes to ask again while a leader is
/// missing (`topic.metadata.refresh.fast.interval.ms`, 100 ms), and a little.
const JUST_LEFT: Duration = Duration::from_millis(120);

/// Brokers that take part no more, and since when.
///
/// librdkafka 2.16 gives up whom Metadata leaves out, at once. If the same answer is the first to say who follows it as a leader, that
/// may leave a partition with nobody until the client looks again, up to a second later; so clients hear of the follower first. Not
/// for longer than that takes: what is waiting for the dead broker in the client waits until it is given up (kernel-notes.md).
#[derive(Clone, Default, Debug)]
pub struct Departures(BTreeMap<i32, Instant>);

impl Departures {
    /// Metadata has changed.
    pub fn note(&mut self, old: &Image, new: &Image, now: Instant) {
        self.0
            .retain(|id, since| !new.is_active(*id) && now - *since < JUST_LEFT);
        let left = old.active().filter(|id| !new.is_active(*id));
        self.0.extend(left.map(|id| (id, now)));
    }

    /// Whether clients are told of a broker: it takes part and does not seem to have died, or left a moment ago.
    #[must_use]
    pub fn tell_of(&self, broker: &Broker, suspects: &BTreeSet<i32>, now: Instant) -> bool {
        let id = broker.registration.node;
        match self.0.get(&id) {
            Some(since) if broker.fenced => now - *since < JUST_LEFT,
            _ => !broker.fenced && !suspects.contains(&id),
        }
    }
}

fn registered(registration: &Registration) -> impl Iterator<Item = Endpoint> {
    registration.clients.iter().enumerate().map(|(core, address)| Endpoint {
        id: registration.node + ID_STEP * core as i32,
        host: address.host.clone(),
        port: address.port,
    })
}

#[cfg(test)]
mod tests {
    use millrace_cluster::metadata::{Address, MetadataRecord};

    use super::*;

    #[test]
    fn a_broker_that_has_left_is_told_of_for_a_moment_longer() {
        let broker = |node: i32, start| {
            MetadataRecord::Broker(Registration {
                node,
                incarnation: [start as u8; 16],
                directory: [node as u8; 16],
                clients: vec![Address {
                    host: "h".into(),
                    port: 9092,
                }],
                peers: Vec::new(),
                rack: None,
                min_insync: 1,
                start,
                levels: (0, 1),
            })
        };
        let both = Image::default().apply(&[broker(1, 1), broker(2, 1)]);
        let one = both.apply(&[MetadataRecord::Fence { node: 2 }]);
        let back = one.apply(&[broker(2, 2)]);
        let us = Endpoints::one(1, "h".into(), 9091);
        let mut departures = Departures::default();
        let told = |image: &Image, departures: &Departures, suspects: &[i32], now| -> Vec<i32> {
            let suspects = suspects.iter().copied().collect();
            let all = us.of_cluster(image, |broker| departures.tell_of(broker, &suspects, now));
            all.into_iter().map(|(e, _)| e.id).collect()
        };
        let now = Instant::now();
        assert_eq!(told(&both, &departures, &[], now), [1, 2]);
        assert_eq!(told(&both, &departures, &[2], now), [1], "it seems to have died");
        departures.note(&both, &one, now);
        assert_eq!(told(&one, &departures, &[2], now), [1, 2], "another leads now");
        // Other news changes nothing.
        departures.note(&one, &one, now + JUST_LEFT / 2);
        assert_eq!(told(&one, &departures, &[2], now + JUST_LEFT / 2), [1, 2]);
        assert_eq!(told(&one, &departures, &[2], now + JUST_LEFT), [1]);
        departures.note(&one, &back, now + JUST_LEFT);
        assert_eq!(told(&back, &departures, &[], now + JUST_LEFT), [1, 2]);
        departures.note(&back, &one, now + JUST_LEFT);
        assert_eq!(told(&one, &departures, &[], now + JUST_LEFT), [1, 2]);
    }

    #[test]
    fn one_address_keeps_the_nodes_id_and_cores_have_their_own() {
        let key = PartitionKey {
            topic: uuid::Uuid::nil(),
            partition: 7,
        };
        let mut view = View::default();
        view.placement.insert(key, 1);
        let one = Endpoints::one(3, "h".into(), 9092);
        assert_eq!(one.naming(&view, key.topic, 7)(&3), 3);
        let cores = Endpoints::per_core(3, "h", &[9093, 9094]);
        assert_eq!(cores.coordinator().id, 3);
        assert_eq!(cores.naming(&view, key.topic, 7)(&3), 100_003);
        assert_eq!(
            cores.naming(&view, key.topic, 7)(&4),
            4,
            "another node's leader is not ours to name"
        );
        assert!(cores.is_ours(100_003) && !cores.is_ours(100_004));
        assert_eq!(Endpoints::refuse_ids(3, 2), None);
        assert!(Endpoints::refuse_ids(100_000, 2).is_some());
    }
}
