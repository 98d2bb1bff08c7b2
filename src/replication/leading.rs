//! What a leader does: begins its leadership, tells its log's moves to the followers' links, moves the high watermark, asks
//! for other ISRs.

use std::{rc::Rc, time::Duration};

use millrace_cluster::{
    controller::brokers::IsrChange,
    metadata::PartitionImage,
    replica::{Leader, message::Says},
};

use super::{Role, Slot, after, link, min_insync, now_ms};
use crate::{coordinator::brokers, node::Node};

/// How often followers that lag are looked for, and high watermarks told that nothing else carried.
const TICK: Duration = Duration::from_millis(100);

/// Begins a leadership, once whatever changes the log has ended, and serves it until it ends.
pub async fn lead(node: &Rc<Node>, slot: Rc<Slot>, image: PartitionImage) {
    let turn = slot.turn.acquire(1).await;
    if slot.check_leads(image.leader_epoch).is_ok() {
        // The metadata came twice before the leadership had begun.
        return;
    }
    if slot.partition.is_deleted() || slot.epoch.get() != image.leader_epoch || node.is_stopping() {
        return;
    }
    if let Err(error) = node.engine.wait_cleared(&slot.key).await {
        tracing::error!(partition = %slot.key, %error, "a leadership cannot begin");
        return;
    }
    // What was appended as a follower is held as firmly as what will be appended now.
    let log_end = slot.partition.status().log_end;
    if slot.partition.wait_durable(log_end).await.is_err() || slot.epoch.get() != image.leader_epoch {
        return;
    }
    let told = slot.partition.status().high_watermark;
    let agreed = node
        .replication
        .notes
        .recall(&slot)
        .map_or(told, |noted| noted.max(told));
    let lag_ms = node.shared.settings.number("replica.lag.time.max.ms");
    let mut leader = Leader::new(node.shared.node_id, image.leader_epoch, log_end, agreed, lag_ms);
    let status = slot.partition.status();
    leader.local(status.log_start, log_end, status.durable_end);
    leader.committed(&image, min_insync(node, &slot, &image), now_ms(node));
    let reached = leader.high_watermark();
    slot.shards.borrow_mut().clear();
    slot.begins_to_lead(now_ms(node));
    slot.role.replace(Role::Leads(Box::new(leader)));
    drop(turn);
    node.engine.advance_high_watermark(&slot.partition, reached);
    // The metadata may have moved on while this waited.
    let view = node.view();
    if let Some(now) = view.image.partition(&slot.key.topic, slot.key.partition)
        && now.leader_epoch == image.leader_epoch
        && let Role::Leads(leader) = &mut *slot.role.borrow_mut()
    {
        leader.committed(now, min_insync(node, &slot, now), now_ms(node));
    }
    slot.partition.changes().wake_all();
    nudge(node, &slot);
    serve(node, &slot, image.leader_epoch).await;
}

/// Follows the log's own moves until the leadership ends.
async fn serve(node: &Rc<Node>, slot: &Rc<Slot>, epoch: i32) {
    let mut seen = (-1, -1, -1);
    loop {
        let moved = slot
            .partition
            .changes()
            .wait(|| {
                let status = slot.partition.status();
                let now = (status.log_start, status.log_end, status.durable_end);
                if slot.check_leads(epoch).is_err() || slot.partition.is_deleted() {
                    return Some(None);
                }
                (now != seen).then_some(Some(now))
            })
            .await;
        let Some((log_start, log_end, durable_end)) = moved else {
            return;
        };
        let has_news = (log_start, log_end) != (seen.0, seen.1);
        seen = (log_start, log_end, durable_end);
        let high_watermark = match &mut *slot.role.borrow_mut() {
            Role::Leads(leader) => {
                leader.local(log_start, log_end, durable_end);
                leader.high_watermark()
            }
            _ => return,
        };
        node.engine.advance_high_watermark(&slot.partition, high_watermark);
        if has_news {
            nudge(node, slot);
        }
    }
}

/// Has the links to all followers look at a partition.
pub fn nudge(node: &Rc<Node>, slot: &Rc<Slot>) {
    let followers: Vec<i32> = match &*slot.role.borrow() {
        Role::Leads(leader) => leader.followers().collect(),
        _ => return,
    };
    for follower in followers {
        link::to(node, slot, follower).push(slot.key);
    }
}

/// A follower has answered.
pub fn answered(node: &Rc<Node>, slot: &Rc<Slot>, from: i32, round: u32, says: Says) {
    let epochs_and = |f: &mut dyn FnMut(&millrace_engine::log::EpochCache, i64) -> bool| {
        slot.partition.with_state(|s| f(&s.epochs, s.log_start()))
    };
    let (moved, deleted, high_watermark) = {
        let mut role = slot.role.borrow_mut();
        let Role::Leads(leader) = &mut *role else { return };
        let now = now_ms(node);
        let before = leader.low_watermark();
        let moved = epochs_and(&mut |epochs, log_start| leader.answered(from, round, says, epochs, log_start, now));
        (moved, leader.low_watermark() > before, leader.high_watermark())
    };
    if deleted {
        slot.partition.changes().wake_all();
    }
    if moved {
        node.engine.advance_high_watermark(&slot.partition, high_watermark);
        if !slot.is_in_isr(from) {
            node.replication.want_isr();
        }
    }
}

impl Slot {
    pub(super) fn is_in_isr(&self, node: i32) -> bool {
        matches!(&*self.role.borrow(), Role::Leads(leader) if leader.isr().contains(&node))
    }
}

/// Asks for other ISRs where followers lag or have caught up, and tells high watermarks that nothing else carried.
pub async fn run(node: Rc<Node>) {
    let replication = &node.replication;
    while !node.is_stopping() {
        after(&node, TICK, &replication.isr_news, || replication.isr_wanted.get()).await;
        replication.isr_wanted.set(false);
        let now = now_ms(&node);
        let image = node.view();
        let mut changes = Vec::new();
        let mut asking = Vec::new();
        let mut failed = Vec::new();
        for slot in replication.all() {
            let mut role = slot.role.borrow_mut();
            let Role::Leads(leader) = &mut *role else { continue };
            let takes_nothing = slot.partition.check_healthy().is_err() || node.engine.lacks_room(&slot.partition);
            if takes_nothing && leader.isr().len() > 1 {
                failed.push((slot.key.topic, slot.key.partition));
                continue;
            }
            if let Some(wish) = leader.isr_wish(now, |n| image.image.is_active(n)) {
                tracing::info!(partition = %slot.key, from = ?leader.isr(), to = ?wish.isr, "another ISR is asked for");
                changes.push(IsrChange {
                    topic: slot.key.topic,
                    partition: slot.key.partition,
                    leader_epoch: leader.epoch(),
                    partition_epoch: wish.partition_epoch,
                    isr: wish.isr,
                });
                asking.push(Rc::clone(&slot));
            }
            let mut untold: Vec<i32> = leader.followers().collect();
            untold.retain(|f| leader.owes_note(*f));
            drop(role);
            for follower in untold {
                link::to(&node, &slot, follower).push(slot.key);
            }
        }
        if !failed.is_empty() {
            tracing::error!(
                partitions = failed.len(),
                "logs of partitions that this broker leads have failed, or have no room: others shall lead them"
            );
            if let Err(failure) = brokers::give_up(&node, failed).await {
                tracing::warn!(error = failure.message, "they could not be given up; it is tried again");
            }
        }
        if changes.is_empty() {
            continue;
        }
        let result = brokers::alter_isr(&node, changes).await;
        if let Err(failure) = &result {
            tracing::warn!(
                error = failure.message,
                "the controller did not take other ISRs; it will be asked again"
            );
        }
        for slot in asking {
            let reached = match &mut *slot.role.borrow_mut() {
                // What was committed has come with the metadata by now.
                Role::Leads(leader) if result.is_ok() => {
                    leader.wish_refused();
                    leader.high_watermark()
                }
                Role::Leads(leader) => {
                    leader.wish_unanswered();
                    continue;
                }
                _ => continue,
            };
            node.engine.advance_high_watermark(&slot.partition, reached);
        }
    }
}
