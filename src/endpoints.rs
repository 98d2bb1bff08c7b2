//! Where clients connect. Ordinarily that is one address, served by every core. With `core.endpoints` each core is told to
//! clients as a broker of its own, with its own port: a client then connects straight to the core that owns a partition, as
//! it connects to a partition's leader anywhere, and its requests cross between cores no more.

use millrace_engine::PartitionKey;

use crate::node::View;

/// Distance between the broker ids of a node's cores; node ids stay below it.
const ID_STEP: i32 = 100_000;

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

    /// The broker that clients are told for a node that leads a partition or holds a replica of it.
    #[must_use]
    pub fn broker_of(&self, node: i32, view: &View, key: &PartitionKey) -> i32 {
        if node != self.node_id || self.list.len() == 1 {
            return node;
        }
        let shard = view.placement.get(key).map_or(0, |s| *s as usize);
        self.list.get(shard).map_or(node, |e| e.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_keeps_the_nodes_id_and_cores_have_their_own() {
        let key = PartitionKey {
            topic: uuid::Uuid::nil(),
            partition: 7,
        };
        let mut view = View::default();
        view.placement.insert(key, 1);
        let one = Endpoints::one(3, "h".into(), 9092);
        assert_eq!(one.broker_of(3, &view, &key), 3);
        let cores = Endpoints::per_core(3, "h", &[9093, 9094]);
        assert_eq!(cores.coordinator().id, 3);
        assert_eq!(cores.broker_of(3, &view, &key), 100_003);
        assert_eq!(
            cores.broker_of(4, &view, &key),
            4,
            "another node's leader is not ours to name"
        );
        assert!(cores.is_ours(100_003) && !cores.is_ours(100_004));
        assert_eq!(Endpoints::refuse_ids(3, 2), None);
        assert!(Endpoints::refuse_ids(100_000, 2).is_some());
    }
}
