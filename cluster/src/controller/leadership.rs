//! Who is in sync and who leads one partition, as replicas come and go.
//!
//! The high watermark moves only while the ISR has at least `min.insync.replicas` members. So whoever leaves an ISR that becomes
//! smaller than that holds all that will be acknowledged until it has grown again: it is an *eligible leader replica* (KIP-966),
//! and leads if nobody in sync can. What a replica holds it holds durably; that it crashed takes nothing from it.

use crate::metadata::{ConfigResource, Image, PartitionImage, TopicImage};

/// Kafka's name of the setting that says how small an ISR may be.
pub const MIN_INSYNC: &str = "min.insync.replicas";
/// Kafka's name of the setting that lets a replica lead that lacks what was acknowledged.
pub const UNCLEAN: &str = "unclean.leader.election.enable";

/// How many replicas must be in sync for the high watermark to move: the topic's setting, else that of the leader, and never
/// more than there are replicas.
#[must_use]
pub fn min_insync(image: &Image, topic: &TopicImage, partition: &PartitionImage) -> usize {
    let of_topic = image
        .config(&ConfigResource::Topic(topic.name.clone()), MIN_INSYNC)
        .and_then(|v| v.parse().ok());
    let of_leader = || {
        image
            .broker(partition.leader)
            .map(|b| b.registration.min_insync as usize)
    };
    let replicas = partition.replicas.len() - partition.adding.len().min(partition.replicas.len());
    of_topic.or_else(of_leader).unwrap_or(1).clamp(1, replicas.max(1))
}

/// Whether a replica that is not in sync may lead if no other can.
#[must_use]
pub fn unclean_allowed(image: &Image, topic: &TopicImage) -> bool {
    image.config(&ConfigResource::Topic(topic.name.clone()), UNCLEAN) == Some("true")
}

/// A partition that is being changed.
pub struct Change<'a, A: Fn(i32) -> bool> {
    image: &'a Image,
    topic: &'a TopicImage,
    may_lead: A,
    /// As it becomes.
    pub next: PartitionImage,
}

impl<'a, A: Fn(i32) -> bool> Change<'a, A> {
    /// A change of `partition`, after which only those lead that `may_lead` allows.
    pub fn new(image: &'a Image, topic: &'a TopicImage, partition: &PartitionImage, may_lead: A) -> Self {
        Self {
            image,
            topic,
            may_lead,
            next: partition.clone(),
        }
    }

    /// Another ISR. Who leaves it may have become eligible.
    pub fn set_isr(&mut self, isr: Vec<i32>) {
        let before = std::mem::replace(&mut self.next.isr, isr);
        if self.next.isr.len() < self.min_insync() {
            let left = before.iter().filter(|n| !self.next.isr.contains(n));
            self.next.elr.extend(left.copied());
        }
        self.settle();
    }

    /// A replica cannot be reached: it leaves the ISR if others are in it, and hands on what it leads.
    pub fn leave(&mut self, node: i32) {
        let mut isr = self.next.isr.clone();
        isr.retain(|n| *n != node);
        if !isr.is_empty() && isr.len() < self.next.isr.len() {
            self.set_isr(isr);
        }
        if self.next.leader == node {
            self.elect();
        }
    }

    /// A replica has lost what it held.
    pub fn forget(&mut self, node: i32) {
        let mut isr = self.next.isr.clone();
        isr.retain(|n| *n != node);
        self.next.isr = isr;
        self.next.elr.retain(|n| *n != node);
        if self.next.leader == node || self.next.isr.is_empty() {
            self.elect();
        }
    }

    /// Makes the best replica lead under a new epoch: the first that is in sync, else the first that is eligible, else, where
    /// the topic allows it, any.
    pub fn elect(&mut self) {
        let in_sync = self.first(|p, n| p.isr.contains(&n));
        let eligible = || self.first(|p, n| p.elr.contains(&n));
        let leader = in_sync.or_else(eligible).or_else(|| {
            let any = || self.first(|_, _| true);
            unclean_allowed(self.image, self.topic).then(any).flatten()
        });
        match leader {
            Some(leader) => self.lead(leader),
            None if self.next.leader >= 0 => {
                self.next.leader = -1;
                self.next.leader_epoch += 1;
            }
            None => {}
        }
    }

    /// Makes a replica lead under a new epoch. If it is not in sync it alone is now.
    pub fn lead(&mut self, leader: i32) {
        let p = &mut self.next;
        if !p.isr.contains(&leader) {
            let clean = p.elr.contains(&leader);
            let before = std::mem::replace(&mut p.isr, vec![leader]);
            if clean {
                // Who was in sync last holds all that was acknowledged, too.
                p.elr.extend(before);
            } else {
                p.elr.clear();
            }
        }
        p.leader = leader;
        p.leader_epoch += 1;
        self.settle();
    }

    /// Ends an exchange of replicas once those that are to stay are in sync: all that are new, and as many as the ISR needs.
    pub fn complete_reassignment(&mut self) {
        let p = &self.next;
        if p.adding.is_empty() && p.removing.is_empty() {
            return;
        }
        let stays = |n: &i32| !p.removing.contains(n);
        let isr: Vec<i32> = p.isr.iter().copied().filter(stays).collect();
        let enough = self.min_insync().min(p.replicas.iter().filter(|n| stays(n)).count());
        if isr.len() < enough || !p.adding.iter().all(|n| isr.contains(n)) || !isr.iter().any(|n| (self.may_lead)(*n)) {
            return;
        }
        let p = &mut self.next;
        let gone = std::mem::take(&mut p.removing);
        p.adding.clear();
        p.replicas.retain(|n| !gone.contains(n));
        p.isr = isr;
        p.elr.retain(|n| !gone.contains(n));
        if gone.contains(&p.leader) {
            self.elect();
        }
        self.settle();
    }

    /// Brings the eligible ones in order: none is needed while enough are in sync.
    pub fn settle(&mut self) {
        let min = self.min_insync();
        let p = &mut self.next;
        if p.leader >= 0 && p.isr.len() >= min {
            p.elr.clear();
        }
        let (isr, replicas) = (&p.isr, &p.replicas);
        p.elr.retain(|n| !isr.contains(n) && replicas.contains(n));
        p.elr.sort_unstable();
        p.elr.dedup();
    }

    fn min_insync(&self) -> usize {
        min_insync(self.image, self.topic, &self.next)
    }

    fn first(&self, fits: impl Fn(&PartitionImage, i32) -> bool) -> Option<i32> {
        let mut replicas = self.next.replicas.iter().copied();
        replicas.find(|n| (self.may_lead)(*n) && fits(&self.next, *n))
    }
}
