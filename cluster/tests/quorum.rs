//! Members of the metadata quorum against a network that loses, delays, doubles and cuts, and crashes that forget what was not
//! persisted. Every change that was said to count is in every image that comes after, once, and all images of one version are
//! the same.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-cluster --test quorum`.

use std::collections::{BTreeMap, BTreeSet};

use millrace_cluster::{
    metadata::{Image, MetadataRecord},
    raft::{Quorum, QuorumConfig},
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
}

const TICK_MS: i64 = 20;

fn config(node: i32, members: i32, seed: u64) -> QuorumConfig {
    QuorumConfig {
        node,
        voters: (0..members).collect(),
        tick_ms: TICK_MS,
        election_ms: 200,
        heartbeat_ms: 60,
        seed,
    }
}

impl Cluster {
    fn new(seed: u64, members: i32) -> Self {
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
        };
        for _ in 0..members {
            cluster.members.push(Member {
                quorum: None,
                disk: Vec::new(),
                writing: None,
            });
        }
        (0..members).for_each(|n| cluster.start(n));
        cluster
    }

    fn start(&mut self, node: i32) {
        let count = self.members.len() as i32;
        let member = &mut self.members[node as usize];
        let mut quorum =
            Quorum::new(&config(node, count, self.rng.below(1 << 30)), &member.disk).expect("the disk is sound");
        quorum.set_snapshot_bytes(3_000);
        member.quorum = Some(quorum);
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
                    if applied.counts {
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
                }
                self.step(node);
            }
        }
    }
}

fn history(seed: u64) {
    println!("seed {seed}");
    let members = if seed.is_multiple_of(3) { 5 } else { 3 };
    let mut cluster = Cluster::new(seed, members);
    cluster.loss = cluster.rng.below(25);
    for _ in 0..120 {
        let node = cluster.rng.below(members as u64) as i32;
        match cluster.rng.below(20) {
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
            _ => cluster.propose(node),
        }
        let ms = cluster.rng.below(120) as i64;
        cluster.run(ms);
    }
    // Everything is mended: a change goes through, and all agree.
    cluster.cut.clear();
    cluster.loss = 0;
    for node in 0..members {
        if cluster.members[node as usize].quorum.is_none() {
            cluster.start(node);
        }
    }
    cluster.run(2_000);
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
}

#[test]
fn what_counts_stays_and_all_agree() {
    let seeds: Vec<u64> = match std::env::var("MILLRACE_SEED") {
        Ok(seed) => vec![seed.parse().expect("MILLRACE_SEED is a number")],
        Err(_) => (1..=40).collect(),
    };
    seeds.into_iter().for_each(history);
}

#[test]
fn alone_it_decides_at_once_and_comes_back_as_it_was() {
    let mut disk = Vec::new();
    for round in 1..=60_u64 {
        let mut quorum = Quorum::new(&config(0, 1, 0), &disk).expect("sound");
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
    let mut quorum = Quorum::new(&config(0, 3, 0), &[] as &[Vec<u8>]).expect("new");
    for bytes in [&[][..], &[0xff; 40], &[8, 1, 16, 1, 24, 9]] {
        quorum.receive(1, bytes, 0).expect_err("no message of node 1 to node 0");
    }
    assert!(quorum.begin().is_none());
    assert!(Quorum::new(&config(0, 3, 0), &[vec![7_u8; 90]]).is_err());
}
