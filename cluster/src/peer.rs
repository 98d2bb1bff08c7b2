//! How nodes meet: the first frames of every stream between them, and how a folder that belongs to no cluster comes into one.
//!
//! Every value is an rkyv archive, checked when it comes in.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use rkyv::{Archive, Deserialize, Serialize};

/// Versions of what nodes say to each other that this build speaks.
pub const VERSIONS: (u16, u16) = (1, 2);
/// From this version on followers answer where their logs start.
pub const LOG_START_VERSION: u16 = 2;

/// What a stream is for.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamKind {
    /// Messages of the metadata quorum, one way.
    Quorum,
    /// Requests of a leader, answers of a follower.
    Replica,
    /// One [`Introduction`] comes back: whoever asks has a new folder.
    Introduce,
}

/// The first frame of a stream: who speaks, and to whom it believes to speak.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Smallest and largest version spoken.
    pub versions: (u16, u16),
    /// The stream's purpose.
    pub kind: StreamKind,
    /// Cluster id; empty while the speaker belongs to none.
    pub cluster_id: String,
    /// The speaker.
    pub node: i32,
    /// Its data folder.
    pub directory: [u8; 16],
    /// Number of this start of it.
    pub start: u64,
    /// Where it is reached.
    pub address: String,
    /// Who is meant.
    pub to_node: i32,
    /// Which of its shards.
    pub to_shard: u32,
}

/// The first frame back.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum HelloAnswer {
    /// Go on, in this version.
    Welcome {
        /// Spoken from here on.
        version: u16,
    },
    /// No, and why, for the log of whoever asked.
    Refused {
        /// In words.
        reason: String,
    },
}

/// What a node says of itself, and of whoever asks.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum Introduction {
    /// Its folder is new, too.
    New {
        /// Its folder.
        directory: [u8; 16],
        /// Where it is reached.
        address: String,
        /// The nodes that it was told to begin a cluster with, itself among them, in order.
        founders: Vec<i32>,
    },
    /// It belongs to a cluster, and whoever asks is a member of that now.
    Member {
        /// Its name.
        cluster_id: String,
        /// The generation of the asker's folder.
        generation: u32,
        /// Nodes of the cluster, and where they are.
        members: Vec<(i32, String)>,
    },
    /// It belongs to a cluster, and whoever asks cannot join it now.
    NotNow {
        /// In words.
        reason: String,
    },
}

/// The version that two ranges have in common, the largest.
#[must_use]
pub fn common_version(a: (u16, u16), b: (u16, u16)) -> Option<u16> {
    let version = a.1.min(b.1);
    (version >= a.0 && version >= b.0).then_some(version)
}

/// What a node with a new folder has heard from one that it was told to begin a cluster with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heard {
    /// Who.
    pub node: i32,
    /// What.
    pub said: Introduction,
}

/// What a node with a new folder does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// It belongs to the cluster.
    Join {
        /// The cluster's name.
        cluster_id: String,
        /// Its folder's generation.
        generation: u32,
        /// Nodes of the cluster, and where they are.
        members: Vec<(i32, String)>,
    },
    /// It begins the cluster for all: they are these, with their folders and addresses.
    Found(Vec<(i32, [u8; 16], String)>),
    /// It asks again, because of this.
    Wait(String),
}

/// Decides what a node with a new folder does, given what it heard from the others. A cluster is only begun when every node that
/// it is to begin with has said that it is new: else disks that were emptied could make one that hides what others still have.
/// The one with the lowest number begins it.
#[must_use]
pub fn arrive(me: i32, directory: [u8; 16], address: &str, founders: &[i32], heard: &[Heard]) -> Arrival {
    let mut not_now = None;
    let mut new = vec![(me, directory, address.to_owned())];
    for Heard { node, said } in heard {
        match said {
            Introduction::Member {
                cluster_id,
                generation,
                members,
            } => {
                return Arrival::Join {
                    cluster_id: cluster_id.clone(),
                    generation: *generation,
                    members: members.clone(),
                };
            }
            Introduction::NotNow { reason } => not_now = Some(format!("node {node}: {reason}")),
            Introduction::New { founders: theirs, .. } if theirs != founders => {
                not_now = Some(format!(
                    "node {node} is to begin a cluster of {theirs:?}, this one of {founders:?}: give all the same --peers"
                ));
            }
            Introduction::New { directory, address, .. } => new.push((*node, *directory, address.clone())),
        }
    }
    if let Some(reason) = not_now {
        return Arrival::Wait(reason);
    }
    let missing: Vec<String> = (founders.iter())
        .filter(|n| !new.iter().any(|(have, _, _)| have == *n))
        .map(i32::to_string)
        .collect();
    if !missing.is_empty() {
        return Arrival::Wait(format!(
            "a new cluster begins once all nodes of --peers are there; not reached: {}",
            missing.join(", ")
        ));
    }
    if founders.iter().min() != Some(&me) {
        return Arrival::Wait("the node with the lowest number is about to begin the cluster".into());
    }
    new.sort_unstable_by_key(|(node, _, _)| *node);
    Arrival::Found(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(node: i32, founders: &[i32]) -> Heard {
        Heard {
            node,
            said: Introduction::New {
                directory: [node as u8; 16],
                address: format!("h{node}:1"),
                founders: founders.to_vec(),
            },
        }
    }

    #[test]
    fn versions_meet_or_do_not() {
        assert_eq!(common_version((1, 3), (2, 5)), Some(3));
        assert_eq!(common_version((1, 1), (2, 5)), None);
    }

    #[test]
    fn the_lowest_begins_a_cluster_once_all_are_there() {
        let all = [1, 2, 3];
        let arrive = |me: i32, heard: &[Heard]| arrive(me, [me as u8; 16], "h:1", &all, heard);
        let Arrival::Wait(reason) = arrive(1, &[new(2, &all)]) else {
            panic!("node 3 was not heard of");
        };
        assert!(reason.ends_with("not reached: 3"), "{reason}");
        let Arrival::Found(members) = arrive(1, &[new(3, &all), new(2, &all)]) else {
            panic!("all are there");
        };
        assert_eq!(members.iter().map(|m| m.0).collect::<Vec<_>>(), all);
        assert!(matches!(arrive(2, &[new(1, &all), new(3, &all)]), Arrival::Wait(_)));
        assert!(
            matches!(arrive(1, &[new(2, &[1, 2]), new(3, &all)]), Arrival::Wait(_)),
            "they disagree"
        );
    }

    #[test]
    fn where_there_is_a_cluster_none_is_begun() {
        let member = Heard {
            node: 3,
            said: Introduction::Member {
                cluster_id: "c".into(),
                generation: 7,
                members: Vec::new(),
            },
        };
        let joined = arrive(1, [1; 16], "h:1", &[1, 2, 3], &[new(2, &[1, 2, 3]), member]);
        assert!(matches!(joined, Arrival::Join { generation: 7, .. }));
        let not_now = Heard {
            node: 3,
            said: Introduction::NotNow { reason: "x".into() },
        };
        let waits = arrive(1, [1; 16], "h:1", &[1, 2, 3], &[new(2, &[1, 2, 3]), not_now]);
        assert!(matches!(waits, Arrival::Wait(_)));
    }
}
