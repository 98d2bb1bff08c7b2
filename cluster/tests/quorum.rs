//! Members of the metadata quorum against a network that loses, delays, doubles and cuts, and crashes that forget what was not
//! persisted; folders are emptied, nodes join, voters change. Every change that was said to count is in every image that comes after, once, and all images of one version are
//! the same.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-cluster --test quorum`.

use std::collections::{BTreeMap, BTreeSet};

use millrace_cluster::{
    controller::members::{self, Joining},
    metadata::{Image, Member as QuorumMember, MetadataRecord},
    raft::{Quorum, QuorumConfig, found},
};

/// xorshift64*, so that a seed gives the same history everywhere.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

struct Member {
    quorum: Option<Quorum>,
    /// Number of its folder, 0 for one that has not begun.
    directory: u8,
    /// What the cluster has told it: the generation of its folder.
    generation: Option<u32>,
    disk: Vec<Vec<u8>>,
    /// A step whose bytes are being written: done at this time.
    writing: Option<(i64, Option<Vec<u8>>)>,
}

struct Cluster {
    rng: Rng,
    now: i64,
    members: Vec<Member>,
    /// Arrival time, from, to, bytes.
    network: Vec<(i64, i32, i32, Vec<u8>)>,
    cut: BTreeSet<(i32, i32)>,
    loss: u64,
    next_id: u64,
    /// Topic ids whose creation was said to count, and the version it had then.
    counted: BTreeMap<u64, ()>,
    images: BTreeMap<u64, Vec<MetadataRecord>>,
    leaders: BTreeMap<u64, i32>,
    emptied: usize,
}

const TICK_MS: i64 = 20;

fn config(node: i32, generation: u32, seed: u64) -> QuorumConfig {
    QuorumConfig {
        node,
        generation,
        tick_ms: TICK_MS,
        election_ms: 200,
        heartbeat_ms: 60,
        seed,
    }
}

/// The log that a cluster of so many voters begins with.
fn founded(voters: i32) -> Vec<u8> {
    let member = |node| QuorumMember {
        node,
        directory: [1; 16],
        generation: 0,
        address: String::new(),
        voter: true,
    };
    found("c", (0..voters).map(member).collect(), 1)
}

impl Cluster {
    /// Voters, and one node more that may join.
    fn new(seed: u64, voters: i32) -> Self {
        let mut cluster = Self {
            rng: Rng(seed * 2 + 1),
            now: 0,
            members: Vec::new(),
            network: Vec::new(),
            cut: BTreeSet::new(),
            loss: 0,
            next_id: 1,
            counted: BTreeMap::new(),
            images: BTreeMap::new(),
            leaders: BTreeMap::new(),
            emptied: 0,
        };
        for node in 0..=voters {
            cluster.members.push(Member {
                quorum: None,
                directory: 1,
                generation: (node < voters).then_some(0),
                // The first begins the cluster, the others hear of it from there.
                disk: if node == 0 { vec![founded(voters)] } else { Vec::new() },
                writing: None,
            });
        }
        (0..voters).for_each(|n| cluster.start(n));
        cluster
    }

    fn start(&mut self, node: i32) {
        let seed = self.rng.below(1 << 30);
        if self.members[node as usize].generation.is_none() && !self.join(node) {
            return;
        }
        let member = &mut self.members[node as usize];
        let Some(generation) = member.generation else { return };
        let mut quorum = Quorum::new(&config(node, generation, seed), &member.disk).expect("the disk is sound");
        quorum.set_snapshot_bytes(3_000);
        member.quorum = Some(quorum);
    }

    /// Asks any other node for a place in the cluster.
    fn join(&mut self, node: i32) -> bool {
        let directory = [self.members[node as usize].directory; 16];
        let other = self.rng.below(self.members.len() as u64) as usize;
        let Some(quorum) = &mut self.members[other].quorum else {
            return false;
        };
        let image = quorum.image();
        if let Some(member) = image.member(node).filter(|m| m.directory == directory) {
            let generation = member.generation;
            self.members[node as usize].generation = Some(generation);
            return true;
        }
        if !quorum.knows_members() {
            return false;
        }
        let joining = Joining {
            node,
            directory,
            address: String::new(),
            old_is_gone: false,
        };
        let records = members::join(image, &joining).expect("no broker has registered");
        let base = image.version;
        let _ = quorum.propose(0, base, records);
        false
    }

    /// A node loses its disk.
    fn empty(&mut self, node: i32) {
        self.crash(node);
        let member = &mut self.members[node as usize];
        member.disk.clear();
        member.directory += 1;
        member.generation = None;
    }

    /// Everybody is up, and votes if the metadata says so: a disk more or less is no loss.
    fn is_whole(&self) -> bool {
        self.members.iter().all(|m| {
            m.quorum.as_ref().is_some_and(|q| {
                let mut voters = q.members().0;
                voters.sort_unstable();
                let wanted: Vec<i32> = q.image().members().filter(|m| m.voter).map(|m| m.node).collect();
                voters == wanted
                    && q.image()
                        .member(q.node())
                        .is_some_and(|m| m.directory == [self.members[q.node() as usize].directory; 16])
            })
        })
    }

    /// Whether those that vote beside a node are a majority.
    fn majority_without(&self, node: i32) -> bool {
        let image = self.members[node as usize].quorum.as_ref().expect("all are up").image();
        let voters = image.members().filter(|m| m.voter).count();
        let others = image.members().filter(|m| m.voter && m.node != node).count();
        others > voters / 2
    }

    /// Somebody wants a node to vote, or not to.
    fn set_voter(&mut self, by: i32, node: i32, voter: bool) {
        let Some(quorum) = &mut self.members[by as usize].quorum else {
            return;
        };
        let image = quorum.image();
        if image.members().filter(|m| m.voter).count() <= 2 && !voter {
            return;
        }
        if let Ok(records) = members::set_voter(image, node, uuid::Uuid::nil(), voter)
            && !records.is_empty()
        {
            let base = image.version;
            let _ = quorum.propose(0, base, records);
        }
    }

    fn crash(&mut self, node: i32) {
        let member = &mut self.members[node as usize];
        member.quorum = None;
        // What was being written is there or not.
        if let Some((_, Some(bytes))) = member.writing.take()
            && self.rng.below(2) == 0
        {
            member.disk.push(bytes);
        }
    }

    fn send(&mut self, from: i32, messages: Vec<millrace_cluster::raft::Outgoing>) {
        for message in messages {
            let copies = match self.rng.below(100) {
                n if n < self.loss => 0,
                n if n < self.loss + self.loss / 2 => 2,
                _ => 1,
            };
            for _ in 0..copies {
                let at = self.now + 1 + self.rng.below(if self.loss > 0 { 40 } else { 5 }) as i64;
                self.network.push((at, from, message.node, message.bytes.clone()));
            }
        }
    }

    fn step(&mut self, node: i32) {
        loop {
            let member = &mut self.members[node as usize];
            let Some(quorum) = &mut member.quorum else { return };
            if let Some((done, _)) = &member.writing {
                if *done > self.now {
                    return;
                }
                if let Some((_, Some(bytes))) = member.writing.take() {
                    member.disk.push(bytes);
                }
                let finished = quorum.finish().expect("sound entries");
                if let Some(bytes) = quorum.compact() {
                    member.disk = vec![bytes];
                }
                let image = quorum.image().clone();
                if quorum.is_leader() {
                    let known = *self.leaders.entry(quorum.term()).or_insert(node);
                    assert_eq!(known, node, "two leaders of term {}", quorum.term());
                }
                for applied in &finished.applied {
                    if applied.counts && applied.id > 0 {
                        self.counted.insert(applied.id, ());
                    }
                }
                self.check(&image);
                self.send(node, finished.send);
            }
            let Some(quorum) = &mut self.members[node as usize].quorum else {
                return;
            };
            let Some(begun) = quorum.begin() else { return };
            let done = self.now
                + if begun.persist.is_some() {
                    1 + self.rng.below(6) as i64
                } else {
                    0
                };
            self.members[node as usize].writing = Some((done, begun.persist));
            self.send(node, begun.send);
        }
    }

    fn check(&mut self, image: &Image) {
        let records = image.snapshot();
        let known = self.images.entry(image.version).or_insert_with(|| records.clone());
        assert_eq!(*known, records, "two images of version {}", image.version);
    }

    /// Creates a topic named after the proposal's id, decided on what the member knows.
    fn propose(&mut self, node: i32) {
        let id = self.next_id;
        let Some(quorum) = &mut self.members[node as usize].quorum else {
            return;
        };
        let base = quorum.image().version;
        let records = vec![MetadataRecord::Topic {
            id: u128::from(id).to_be_bytes(),
            name: format!("t{id}"),
        }];
        if quorum.propose(id, base, records).is_ok() {
            self.next_id += 1;
        }
    }

    fn run(&mut self, ms: i64) {
        let end = self.now + ms;
        while self.now < end {
            self.now += 1;
            let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.network)
                .into_iter()
                .partition(|m| m.0 <= self.now);
            self.network = later;
            for (_, from, to, bytes) in due {
                if !self.cut.contains(&(from, to))
                    && let Some(quorum) = &mut self.members[to as usize].quorum
                {
                    quorum.receive(from, &bytes, self.now).expect("a sound message");
                }
            }
            for node in 0..self.members.len() as i32 {
                if self.now % TICK_MS == i64::from(node)
                    && let Some(quorum) = &mut self.members[node as usize].quorum
                {
                    quorum.tick();
                    quorum.settle_members().expect("sound members");
                }
                self.step(node);
            }
        }
    }
}

/// Returns how many disks were lost.
fn history(seed: u64) -> usize {
    println!("seed {seed}");
    let voters = if seed.is_multiple_of(3) { 5 } else { 3 };
    let mut cluster = Cluster::new(seed, voters);
    let members = voters + 1;
    cluster.loss = cluster.rng.below(25);
    for _ in 0..160 {
        let node = cluster.rng.below(members as u64) as i32;
        match cluster.rng.below(24) {
            0 => cluster.crash(node),
            1..4 => {
                if let Some(down) = cluster.members.iter().position(|m| m.quorum.is_none()) {
                    cluster.start(down as i32);
                }
            }
            4 => {
                let other = cluster.rng.below(members as u64) as i32;
                cluster.cut.insert((node, other));
                if cluster.rng.below(2) == 0 {
                    cluster.cut.insert((other, node));
                }
            }
            5 | 6 => cluster.cut.clear(),
            7 | 8 => {
                let (other, voter) = (cluster.rng.below(members as u64) as i32, cluster.rng.below(3) > 0);
                cluster.set_voter(node, other, voter);
            }
            9 | 10 if cluster.is_whole() && cluster.majority_without(node) => {
                cluster.emptied += 1;
                cluster.empty(node);
            }
            _ => cluster.propose(node),
        }
        let ms = cluster.rng.below(120) as i64;
        cluster.run(ms);
    }
    // Everything is mended: a change goes through, and all agree.
    cluster.cut.clear();
    cluster.loss = 0;
    for _ in 0..100 {
        for node in 0..members {
            if cluster.members[node as usize].quorum.is_none() {
                cluster.start(node);
            }
        }
        cluster.run(100);
    }
    let places: Vec<String> = (cluster.members.iter())
        .map(|m| match &m.quorum {
            Some(q) => format!(
                "leads {} members {:?} wanted {:?} applied {} term {}",
                q.is_leader(),
                q.members(),
                q.image()
                    .members()
                    .map(|m| (m.node, m.generation, m.voter))
                    .collect::<Vec<_>>(),
                q.applied_index(),
                q.term(),
            ),
            None => format!("out, generation {:?}", m.generation),
        })
        .collect();
    assert!(cluster.is_whole(), "not everybody has a place in the end: {places:#?}");
    let before = cluster.counted.len();
    for _ in 0..20 {
        let node = cluster.rng.below(members as u64) as i32;
        cluster.propose(node);
        cluster.run(200);
    }
    assert!(
        cluster.counted.len() > before,
        "no progress after everything was mended"
    );
    let images: Vec<Image> = (cluster.members.iter())
        .map(|m| m.quorum.as_ref().expect("started").image().clone())
        .collect();
    for image in &images {
        assert_eq!(image.version, images[0].version, "a member does not catch up");
        assert!(
            image.snapshot() == images[0].snapshot(),
            "two images of version {}",
            image.version
        );
        for id in cluster.counted.keys() {
            assert!(
                image.topic(&format!("t{id}")).is_some(),
                "change {id} was said to count and is gone"
            );
        }
        assert_eq!(
            image.topic_count(),
            cluster.counted.len(),
            "a change counts that nobody was told of"
        );
    }
    cluster.emptied
}

#[test]
fn what_counts_stays_and_all_agree() {
    let seeds: Vec<u64> = match std::env::var("MILLRACE_SEED") {
        Ok(seed) => vec![seed.parse().expect("MILLRACE_SEED is a number")],
        Err(_) => (1..=200).collect(),
    };
    let many = seeds.len() > 1;
    let emptied: usize = seeds.into_iter().map(history).sum();
    assert!(emptied > 20 || !many, "{emptied} disks were lost");
}

#[test]
fn alone_it_decides_at_once_and_comes_back_as_it_was() {
    let mut disk = vec![founded(1)];
    for round in 1..=60_u64 {
        let mut quorum = Quorum::new(&config(0, 0, 0), &disk).expect("sound");
        quorum.set_snapshot_bytes(600);
        let step = |quorum: &mut Quorum, disk: &mut Vec<Vec<u8>>| {
            let mut counted = 0;
            while let Some(begun) = quorum.begin() {
                disk.extend(begun.persist);
                counted += quorum
                    .finish()
                    .expect("sound")
                    .applied
                    .iter()
                    .filter(|a| a.counts)
                    .count();
            }
            counted
        };
        step(&mut quorum, &mut disk);
        assert!(quorum.is_leader() && quorum.is_alone());
        assert_eq!(quorum.image().topic_count() as u64, round - 1);
        let base = quorum.image().version;
        let records = vec![MetadataRecord::Topic {
            id: u128::from(round).to_be_bytes(),
            name: format!("t{round}"),
        }];
        quorum.propose(round, base, records.clone()).expect("it leads");
        quorum.propose(round, base, records).expect("it leads");
        assert_eq!(
            step(&mut quorum, &mut disk),
            1,
            "the second was decided on an image gone by"
        );
        if let Some(bytes) = quorum.compact() {
            disk = vec![bytes];
        }
    }
    assert!(disk.len() < 30, "the log is cut by snapshots");
}

#[test]
fn garbage_from_a_peer_changes_nothing() {
    let mut quorum = Quorum::new(&config(0, 0, 0), &[] as &[Vec<u8>]).expect("new");
    for bytes in [&[][..], &[0xff; 40], &[8, 1, 16, 1, 24, 9]] {
        quorum.receive(1, bytes, 0).expect_err("no message of node 1 to node 0");
    }
    assert!(quorum.begin().is_none());
    assert!(Quorum::new(&config(0, 0, 0), &[vec![7_u8; 90]]).is_err());
}
