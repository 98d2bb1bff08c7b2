//! Connections to other nodes: [`ports`] are bound, [`dial`] opens streams, [`serve`] takes them, [`credentials`] says who is who,
//! [`contacts`] where they are, [`introduce`] is how new folders come into a cluster, [`quorum_link`] carries the metadata quorum's messages, [`pulse`] notices deaths. What the streams of replication carry is in
//! [`replication`](crate::replication).

pub mod ca;
pub mod contacts;
pub mod credentials;
pub mod dial;
pub mod introduce;
pub mod ports;
pub mod pulse;
pub mod quorum_link;
pub mod serve;

use std::{collections::BTreeMap, net::ToSocketAddrs};

use thiserror::Error;

use crate::{address, config::Settings};

/// Bytes of one frame at the most: a snapshot of the metadata is the largest.
pub const FRAME_MAX: usize = 256 << 20;

/// Settings of the cluster that cannot be.
#[derive(Debug, Error)]
#[error("{setting}: {reason}")]
pub struct ClusterConfigError {
    /// Which.
    pub setting: &'static str,
    /// Why, and what to do.
    pub reason: String,
}

/// Who the cluster begins with, and where they are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Members {
    /// Node id → `HOST:PORT` of its first shard, the next ones have the ports behind it; this node among them. Empty for a node alone.
    pub addresses: BTreeMap<i32, String>,
}

impl Members {
    /// From `peers` and `cluster.listen`.
    ///
    /// # Errors
    /// [`ClusterConfigError`].
    pub fn parse(settings: &Settings, node_id: i32) -> Result<Self, ClusterConfigError> {
        let (listen, peers) = (settings.get("cluster.listen"), settings.get("peers"));
        let wrong = |setting: &'static str, reason: String| ClusterConfigError { setting, reason };
        if listen.is_empty() && peers.is_empty() {
            return Ok(Self::default());
        }
        if listen.is_empty() {
            return Err(wrong(
                "cluster.listen",
                "with --peers, say with --cluster-listen HOST:PORT where the others reach this node".into(),
            ));
        }
        address::split_told(listen).map_err(|e| wrong("cluster.listen", format!("{listen:?}: {e}")))?;
        let mut addresses = BTreeMap::new();
        for peer in peers.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let parsed = peer.split_once('@').and_then(|(id, address)| {
                let id: i32 = id.trim().parse().ok().filter(|id| *id >= 0)?;
                Some((id, address.trim().to_owned()))
            });
            let Some((id, address)) = parsed else {
                return Err(wrong(
                    "peers",
                    format!("{peer:?} is not ID@HOST:PORT; write for example 1@10.0.0.1:9192,2@10.0.0.2:9192"),
                ));
            };
            address::split_told(&address).map_err(|e| wrong("peers", format!("{peer:?}: {e}")))?;
            if addresses.insert(id, address).is_some() {
                return Err(wrong("peers", format!("node {id} stands there twice")));
            }
        }
        if addresses.is_empty() {
            addresses.insert(node_id, listen.to_owned());
        }
        if !addresses.contains_key(&node_id) {
            return Err(wrong(
                "peers",
                format!("this node, {node_id}, is not among them; --node-id says which one it is"),
            ));
        }
        Ok(Self { addresses })
    }

    /// Whether there are other nodes, or may be.
    #[must_use]
    pub fn is_cluster(&self) -> bool {
        !self.addresses.is_empty()
    }

    /// Where the others reach this node; empty for one that is alone.
    #[must_use]
    pub fn own_address(&self, node_id: i32) -> String {
        self.addresses.get(&node_id).cloned().unwrap_or_default()
    }

    /// Whether every address is this machine's own, so that a development CA will do.
    #[must_use]
    pub fn all_loopback(&self) -> bool {
        self.addresses.values().all(|address| {
            address
                .to_socket_addrs()
                .is_ok_and(|mut all| all.all(|a| a.ip().is_loopback()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(listen: &str, peers: &str) -> Result<Members, ClusterConfigError> {
        let mut settings = Settings::default();
        settings.set("cluster.listen", listen).expect("any text");
        settings.set("peers", peers).expect("any text");
        Members::parse(&settings, 2)
    }

    #[test]
    fn members_are_named_with_their_addresses() {
        assert!(!parse("", "").expect("a node alone").is_cluster());
        let members = parse("127.0.0.1:2", "1@127.0.0.1:1, 2@localhost:2").expect("sound");
        assert_eq!(members.addresses.len(), 2);
        assert!(members.all_loopback());
        assert!(!parse("0.0.0.0:2", "2@10.1.2.3:2").expect("sound").all_loopback());
        for (listen, peers) in [
            ("", "2@h:1"),
            ("h:1", "h:1"),
            ("h:1", "2@h"),
            ("h:1", "2@h:x"),
            ("h:1", "2@h:0"),
            ("h:1", "2@:1"),
            ("h:1", "2@::1:1"),
            (":1", "2@h:1"),
            ("h:0", "2@h:1"),
            ("::1:1", "2@h:1"),
            ("h:1", "-2@h:1"),
            ("h:1", "1@h:1"),
            ("h:1", "2@h:1,2@h:2"),
        ] {
            assert!(parse(listen, peers).is_err(), "{listen} {peers}");
        }
    }
}
