//! Where other nodes may be reached. A node's address can change while it is down, or all addresses at once, and the metadata
//! then names the old ones until the node has registered again; so it is only one of several sources, and the last.

use std::collections::BTreeMap;

/// What this node knows of the others' addresses beside the metadata.
#[derive(Default)]
pub struct Contacts {
    /// By `--peers`.
    configured: BTreeMap<i32, String>,
    /// As whoever let this node in said.
    told: BTreeMap<i32, String>,
    /// As each node said of itself, with a certificate of its own.
    heard: BTreeMap<i32, String>,
    /// How often an address of a node has failed: each time the next one's turn comes.
    turns: BTreeMap<i32, usize>,
}

impl Contacts {
    /// With what `--peers` says.
    #[must_use]
    pub fn new(configured: BTreeMap<i32, String>) -> Self {
        Self {
            configured,
            ..Self::default()
        }
    }

    /// Nodes of the cluster, as one of them has told.
    pub fn tell(&mut self, members: Vec<(i32, String)>) {
        self.told.extend(members);
    }

    /// A node says where it is. What it said last is tried first.
    pub fn hear(&mut self, node: i32, address: &str) {
        if !address.is_empty() && self.heard.get(&node).is_none_or(|known| known != address) {
            self.heard.insert(node, address.to_owned());
            self.turns.remove(&node);
        }
    }

    /// All nodes that this one was told of.
    pub fn nodes(&self) -> impl Iterator<Item = i32> {
        let told = self.told.keys().filter(|n| !self.configured.contains_key(n));
        self.configured.keys().chain(told).copied()
    }

    /// The address whose turn it is; `registered` is the metadata's.
    #[must_use]
    pub fn address(&self, node: i32, registered: Option<&str>) -> Option<String> {
        let all = self.all(node, registered);
        let turn = self.turns.get(&node).copied().unwrap_or(0);
        (!all.is_empty()).then(|| all[turn % all.len()].to_owned())
    }

    /// An address did not lead to the node. Another dialer may have noticed before.
    pub fn failed(&mut self, node: i32, address: &str, registered: Option<&str>) {
        if self.address(node, registered).is_some_and(|a| a == address) {
            *self.turns.entry(node).or_default() += 1;
        }
    }

    fn all<'a>(&'a self, node: i32, registered: Option<&'a str>) -> Vec<&'a str> {
        let of = |known: &'a BTreeMap<i32, String>| known.get(&node).map(String::as_str);
        let sources = [of(&self.heard), of(&self.configured), registered, of(&self.told)];
        let mut all = Vec::with_capacity(sources.len());
        for address in sources.into_iter().flatten().filter(|a| !a.is_empty()) {
            if !all.contains(&address) {
                all.push(address);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_has_its_turn_and_what_a_node_says_of_itself_comes_first() {
        let mut contacts = Contacts::new(BTreeMap::from([(2, "peers:1".to_owned())]));
        contacts.tell(vec![(2, "told:1".into()), (3, "told:3".into())]);
        assert_eq!(contacts.nodes().collect::<Vec<_>>(), [2, 3]);
        let at = |c: &Contacts| c.address(2, Some("metadata:1")).expect("several");
        for expected in ["peers:1", "metadata:1", "told:1", "peers:1"] {
            assert_eq!(at(&contacts), expected);
            contacts.failed(2, expected, Some("metadata:1"));
            // Two that dialed the same at once have failed once.
            contacts.failed(2, expected, Some("metadata:1"));
        }
        contacts.hear(2, "itself:1");
        assert_eq!(at(&contacts), "itself:1");
        contacts.failed(2, "itself:1", Some("metadata:1"));
        assert_eq!(at(&contacts), "peers:1", "it may have moved again");
        contacts.hear(2, "itself:1");
        assert_eq!(at(&contacts), "peers:1", "what is known already changes nothing");
        assert_eq!(contacts.address(9, None), None);
        assert_eq!(contacts.address(9, Some("metadata:9")).as_deref(), Some("metadata:9"));
    }
}
