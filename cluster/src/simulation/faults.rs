//! What goes wrong in a world.

use millrace_engine::Offset;

use super::{World, metadata::lose_log, node::Role};

impl World {
    pub(super) fn mend(&mut self) {
        self.faults = false;
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            if !self.nodes[node].up {
                self.start(node);
            }
        }
    }

    pub(super) fn active(&self, node: usize) -> bool {
        self.nodes[node].up && self.nodes[node].paused_until <= self.now
    }

    pub(super) fn fault(&mut self) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        match self.rng.below(300) {
            0 if self.nodes[node].up => self.crash(node),
            1 | 2 if !self.nodes[node].up => self.start(node),
            3 => {
                self.nodes[node].paused_until = self.now + self.rng.below(300) as i64;
                self.tell(|w| format!("node {node} is paused until {}", w.nodes[node].paused_until));
            }
            // A whole rack, or all of them: power is gone.
            7 if self.rng.chance(2) => {
                let all = self.rng.chance(2);
                for other in 0..self.nodes.len() {
                    if self.nodes[other].up && (all || other != node) {
                        self.crash(other);
                    }
                }
            }
            8 if self.nodes[node].up => self.empty(node),
            // Nobody gives up a copy while another one is lost and nobody knows yet.
            9 if self.rng.chance(2) && !self.nodes.iter().any(|n| n.emptied) => self.reassign(),
            4..7 => {
                let other = self.rng.below(self.nodes.len() as u64) as usize;
                self.cut_link(node, other);
            }
            _ => {}
        }
    }

    pub(super) fn crash(&mut self, node: usize) {
        let extra = self.nodes[node].log.len() - self.nodes[node].durable;
        let kept = self.nodes[node].durable + self.rng.below(extra as u64 + 1) as usize;
        let n = &mut self.nodes[node];
        n.cut(kept as Offset);
        n.durable = n.log.len();
        n.forget();
        self.unread.retain(|(_, to, _)| *to != node);
        for other in 0..self.nodes.len() {
            self.cut_link(node, other);
        }
        self.waiting.retain(|w| w.node != node);
        self.producers_lose(node);
        self.trace(node as u64);
        self.tell(|w| format!("node {node} crashes, its log ends at {}", w.nodes[node].log.len()));
    }

    /// A node loses its disk, if others have what was acknowledged. One at a time: nobody promises anything about more.
    pub(super) fn empty(&mut self, node: usize) {
        let p = self.partition();
        let others = p.isr.iter().chain(&p.elr).any(|n| *n as usize != node);
        if !others || self.nodes.iter().any(|n| n.emptied) {
            return;
        }
        self.crash(node);
        let n = &mut self.nodes[node];
        lose_log(n);
        n.noted = None;
        n.emptied = true;
        n.directory += 1;
        self.tell(|_| format!("node {node} loses its disk"));
    }

    pub(super) fn start(&mut self, node: usize) {
        self.nodes[node].up = true;
        self.nodes[node].started += 1;
        self.register(node);
    }

    /// A connection breaks: what was on its way is lost, or lies unread until its reader gets to it, and the side that leads notices.
    pub(super) fn cut_link(&mut self, a: usize, b: usize) {
        self.tell(|_| format!("the connection of {a} and {b} breaks"));
        for (from, to) in [(a, b), (b, a)] {
            let Some(mut left) = self.links.remove(&(from, to)) else {
                continue;
            };
            if self.nodes[to].up && self.rng.chance(3) {
                let pause = self.rng.below(200) as i64;
                left.iter_mut().for_each(|(at, _)| *at += pause);
                self.unread.push((from, to, left));
            }
        }
        for (leader, follower) in [(a, b), (b, a)] {
            if let Role::Leads(state) = &mut self.nodes[leader].role {
                state.lost(follower as i32);
            }
        }
    }
}
