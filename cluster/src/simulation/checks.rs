//! The producers of a world, and what must always hold.

use millrace_engine::Offset;

use super::{Bug, MIN_INSYNC, TOPIC, Waiting, World, node::Role};

impl World {
    /// A producer sends a record to whoever believes to lead, gone by or not.
    pub(super) fn produce(&mut self) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        if !self.active(node) || !self.rng.chance(2) {
            return;
        }
        let value = self.next_value;
        let n = &mut self.nodes[node];
        let Role::Leads(leader) = &n.role else { return };
        // One that wants no more than the leader's word is taken even so.
        let all = leader.isr().len() >= MIN_INSYNC;
        if !all && !self.rng.chance(4) {
            return;
        }
        self.next_value += 1;
        let waiting = Waiting {
            node,
            epoch: n.epoch,
            offset: n.log_end(),
            value,
        };
        n.append((n.epoch, value));
        if all {
            self.waiting.push(waiting);
        }
    }

    /// Somebody deletes records with whoever believes to lead.
    pub(super) fn delete(&mut self) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        if !self.active(node) || !self.rng.chance(20) {
            return;
        }
        let n = &mut self.nodes[node];
        let Role::Leads(_) = n.role else { return };
        let to = n.high_watermark - self.rng.below(10) as Offset;
        if to > n.log_start {
            n.log_start = to;
            self.deleting.push((node, n.epoch, to));
        }
    }

    /// Deletions are answered once every replica in sync has them.
    pub(super) fn acknowledge_deletions(&mut self) {
        let mut still = Vec::new();
        for (node, epoch, to) in std::mem::take(&mut self.deleting) {
            let n = &self.nodes[node];
            let deleted = match &n.role {
                _ if !self.active(node) => false,
                Role::Leads(_) if n.epoch == epoch && self.bug == Bug::DeletesAlone => true,
                Role::Leads(leader) if n.epoch == epoch => leader.low_watermark() >= to,
                _ => continue,
            };
            if deleted {
                self.deleted = self.deleted.max(to);
                self.outcome.deletions += 1;
            } else {
                still.push((node, epoch, to));
            }
        }
        self.deleting = still;
    }

    pub(super) fn acknowledge(&mut self) -> Result<(), String> {
        let mut still = Vec::new();
        for w in std::mem::take(&mut self.waiting) {
            let n = &self.nodes[w.node];
            let in_sync = match &n.role {
                Role::Leads(leader) if n.epoch == w.epoch => leader.isr().len(),
                // The leadership is over: whether it was written, nobody can say.
                _ => continue,
            };
            if !self.active(w.node) || n.high_watermark <= w.offset {
                still.push(w);
                continue;
            }
            if in_sync < MIN_INSYNC {
                continue;
            }
            self.acknowledged_at(w.offset, w.value)?;
        }
        self.waiting = still;
        self.trace(self.outcome.acknowledged as u64);
        Ok(())
    }

    /// A producer was told that its record stands there.
    pub(super) fn acknowledged_at(&mut self, offset: Offset, value: u64) -> Result<(), String> {
        self.outcome.acknowledged += 1;
        if let Some(other) = self.acknowledged.insert(offset, value) {
            return Err(self.fail(format!("offset {offset} was acknowledged as {other} and as {value}")));
        }
        match self.leader() {
            Some(leader) => self.holds(leader, offset, value),
            None => Ok(()),
        }
    }

    /// Who leads under the latest epoch, and knows it.
    pub(super) fn leader(&self) -> Option<usize> {
        let current = self.image.partition(&TOPIC, 0)?;
        let leader = usize::try_from(current.leader).ok()?;
        let n = &self.nodes[leader];
        (matches!(n.role, Role::Leads(_)) && n.epoch == current.leader_epoch).then_some(leader)
    }

    /// Fails unless a node's log has a record that was acknowledged.
    pub(super) fn holds(&self, node: usize, offset: Offset, value: u64) -> Result<(), String> {
        match self.nodes[node].log.get(offset as usize) {
            Some((_, found)) if *found == value => Ok(()),
            _ => Err(self.fail(format!(
                "record {value} was acknowledged at {offset} and is not in the log of leader {node}"
            ))),
        }
    }

    pub(super) fn check(&mut self) -> Result<(), String> {
        for node in 0..self.nodes.len() {
            let n = &mut self.nodes[node];
            let Role::Leads(_) = n.role else { continue };
            let (from, to) = (n.checked, n.high_watermark);
            n.checked = to;
            if to > n.log_end() {
                return Err(self.fail(format!("node {node} has a high watermark beyond its log")));
            }
            for offset in from..to {
                let value = self.nodes[node].log[offset as usize].1;
                let known = match self.visible.get(&offset) {
                    Some(known) => *known,
                    None => {
                        self.visible.insert(offset, value);
                        self.seen_in_sequence(offset, value)?;
                        value
                    }
                };
                if known != value {
                    return Err(self.fail(format!(
                        "offset {offset} was seen as {known}, node {node} shows {value}"
                    )));
                }
            }
        }
        if let Some(leader) = self.leader()
            && self.nodes[leader].log_start < self.deleted
        {
            return Err(self.fail(format!(
                "records before {} were deleted, and leader {leader} has them from {} on",
                self.deleted, self.nodes[leader].log_start
            )));
        }
        // All of it when a leadership begins; what is acknowledged later is looked for when it is.
        if let Some(leader) = self.leader()
            && self.looked_through.replace(self.nodes[leader].epoch) != Some(self.nodes[leader].epoch)
        {
            for (offset, value) in &self.acknowledged {
                self.holds(leader, *offset, *value)?;
            }
        }
        Ok(())
    }
}
