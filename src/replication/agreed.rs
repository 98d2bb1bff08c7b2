//! Notes of high watermarks, so that a restart does not forget what the replicas had agreed on (`millrace_engine::agreed`).

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use millrace_engine::{
    Offset, PartitionMap, StorageError,
    agreed::{self, Agreed},
    layout,
    sync::Budget,
};

use super::{Role, Slot, after};
use crate::node::Node;

/// Time between notes, that of Kafka's `replica.high.watermark.checkpoint.interval.ms`.
const PAUSE: Duration = Duration::from_secs(5);

/// What a shard has noted of its partitions, and found noted by earlier ones.
pub struct Notes {
    known: RefCell<PartitionMap<Agreed>>,
    /// Whoever writes them holds this.
    turn: Rc<Budget>,
    /// They could not be written last time.
    failed: Cell<bool>,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            known: RefCell::default(),
            turn: Budget::new(1),
            failed: Cell::new(false),
        }
    }
}

impl Notes {
    /// What all replicas in sync of a partition held once, as far as this node noted it; no less than its log start.
    pub(super) fn recall(&self, slot: &Slot) -> Offset {
        let noted = self.known.borrow().get(&slot.key).copied();
        (slot.partition).with_state(|s| {
            let noted = noted.and_then(|n| n.recall(&s.epochs, s.log_end()));
            noted.map_or(s.log_start(), |n| n.max(s.log_start()))
        })
    }
}

/// Finds what was noted before this start.
///
/// # Errors
/// The folder cannot be listed.
pub async fn load(node: &Node) -> Result<(), StorageError> {
    let dir = layout::agreed_dir(&node.shared.data_dir);
    let known = agreed::load(&node.host, &dir).await?;
    node.replication.notes.known.replace(known);
    Ok(())
}

/// Notes what moves, until the broker stops.
pub async fn run(node: Rc<Node>) {
    while !node.is_stopping() {
        after(&node, PAUSE, &node.stop, || node.is_stopping()).await;
        note(&node).await;
    }
}

/// Notes what has moved since the last time.
pub async fn note(node: &Node) {
    let notes = &node.replication.notes;
    let _turn = notes.turn.acquire(1).await;
    let now = gather(node);
    // Without partitions it may only not know yet which are its own: what was noted stays.
    if now.is_empty() || *notes.known.borrow() == now {
        return;
    }
    let dir = layout::agreed_dir(&node.shared.data_dir);
    match agreed::store(&node.host, &dir, node.shard as u32, &now).await {
        Ok(()) => {
            notes.known.replace(now);
            notes.failed.set(false);
        }
        Err(error) if !notes.failed.replace(true) => tracing::warn!(
            %error,
            "what replicas agreed on cannot be noted: after a restart, readers may have to wait until enough replicas are in sync"
        ),
        Err(_) => {}
    }
}

fn gather(node: &Node) -> PartitionMap<Agreed> {
    let known = node.replication.notes.known.borrow();
    let slots = node.replication.slots.borrow();
    let replicated = (slots.values()).filter(|s| !matches!(*s.role.borrow(), Role::Alone));
    let noted = replicated.filter_map(|slot| {
        let before = known.get(&slot.key).copied();
        let agreed = (slot.partition).with_state(|s| {
            let now = Agreed::of(s.high_watermark(), &s.epochs);
            Agreed::or_before(now, before, &s.epochs, s.log_end())
        });
        Some((slot.key, agreed?))
    });
    noted.collect()
}
