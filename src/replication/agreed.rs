//! Notes of high watermarks, so that a restart does not forget what the replicas had agreed on (`millrace_engine::agreed`).

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use millrace_engine::{
    Offset, PartitionMap, StorageError,
    agreed::{self, Agreed},
    host::Host,
    layout,
    sync::Budget,
};

use super::{Role, Slot, after};
use crate::node::Node;

/// Time between notes, that of Kafka's `replica.high.watermark.checkpoint.interval.ms`.
const PAUSE: Duration = Duration::from_secs(5);

/// Partitions looked at before others have their turn.
const TURN: usize = 512;

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
    /// What all replicas in sync of a partition held once, as far as this node noted it of the log that is there.
    pub(super) fn recall(&self, slot: &Slot) -> Option<Offset> {
        let noted = self.known.borrow().get(&slot.key).copied()?;
        slot.partition.with_state(|s| noted.recall(&s.epochs, s.log_end()))
    }
}

/// Finds what was noted before this start.
///
/// # Errors
/// The folder cannot be listed.
pub async fn find(node: &Node) -> Result<PartitionMap<Agreed>, StorageError> {
    agreed::load(&node.host, &layout::agreed_dir(&node.shared.data_dir)).await
}

/// Takes in what was noted before this start.
pub fn remember(node: &Node, found: PartitionMap<Agreed>) {
    node.replication.notes.known.replace(found);
}

/// Notes what moves, until the broker stops; who stops it notes what is left.
pub async fn run(node: Rc<Node>) {
    loop {
        after(&node, PAUSE, &node.stop, || node.is_stopping()).await;
        if node.is_stopping() {
            return;
        }
        note(&node).await;
    }
}

/// Notes what has moved since the last time.
pub async fn note(node: &Node) {
    let notes = &node.replication.notes;
    let _turn = notes.turn.acquire(1).await;
    let (noted, moved) = gather(node).await;
    // Without partitions it may only not know yet which are its own: what was noted stays.
    if noted.is_empty() || !moved {
        return;
    }
    let dir = layout::agreed_dir(&node.shared.data_dir);
    match agreed::store(&node.host, &dir, node.shard as u32, &noted).await {
        Ok(()) => {
            notes.known.replace(noted);
            notes.failed.set(false);
        }
        Err(error) if !notes.failed.replace(true) => tracing::warn!(
            %error,
            "what replicas agreed on cannot be noted: after a restart, readers may have to wait until enough replicas are in sync"
        ),
        Err(_) => {}
    }
}

/// What is to be noted, and whether that is anything new.
async fn gather(node: &Node) -> (PartitionMap<Agreed>, bool) {
    let known = &node.replication.notes.known;
    let mut noted = PartitionMap::default();
    let mut moved = false;
    for (n, slot) in node.replication.all().into_iter().enumerate() {
        if n % TURN == TURN - 1 {
            node.host.yield_now().await;
        }
        if matches!(*slot.role.borrow(), Role::Alone) || slot.partition.is_deleted() {
            continue;
        }
        let before = known.borrow().get(&slot.key).copied();
        let agreed =
            (slot.partition).with_state(|s| Agreed::renewed(before, s.high_watermark(), &s.epochs, s.log_end()));
        moved |= agreed != before;
        noted.extend(agreed.map(|a| (slot.key, a)));
    }
    moved |= noted.len() != known.borrow().len();
    (noted, moved)
}
