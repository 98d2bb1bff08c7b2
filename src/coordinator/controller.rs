//! Changes of the metadata: decided on the latest image, agreed on by the quorum, and handed to every shard before they are
//! answered.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_cluster::{
    controller::{placement::Place, size, topics::Defaults},
    cores::Homes,
    metadata::{ConfigResource, Image, MetadataRecord},
};
use millrace_engine::{
    PartitionKey, PartitionMap,
    sync::{Budget, Permit, WaitList},
};

pub use super::quorum::MetadataError;
use super::quorum::QuorumDriver;
use crate::{
    kafka::errors::Failure,
    node::{Node, OFFSETS_TOPIC, View},
    router::Stopping,
};

/// Setting of a broker that is to get no new replicas.
pub const DRAINING: &str = "broker.draining";

/// Between two questions for what is agreed on.
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// Whether a node knows all that was agreed on before it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CaughtUp {
    /// It does, on every shard.
    Yes,
    /// The quorum has not said in time what that is.
    NotInTime,
    /// There is no quorum that could say it, and none is about to be.
    NoQuorum,
}

/// The controller's side of a node.
pub struct ControllerDriver {
    /// The node's member of the quorum.
    pub quorum: Rc<QuorumDriver>,
    /// One change of this node at a time: two decided on one image could not both count.
    turn: Rc<Budget>,
    /// One question for what is agreed on at a time: those that come meanwhile share the next.
    looking: Rc<Budget>,
    /// When the last one began, and whether it was answered.
    looked: Cell<Option<(Instant, CaughtUp)>>,
    installed: Cell<u64>,
    /// Wakes when the shards have a new image.
    installs: WaitList,
    /// Whoever says where partitions are holds this.
    placing: Rc<Budget>,
    homes: RefCell<Homes>,
}

impl ControllerDriver {
    /// For a member of the quorum.
    #[must_use]
    pub fn new(quorum: Rc<QuorumDriver>) -> Self {
        Self {
            quorum,
            turn: Budget::new(1),
            looking: Budget::new(1),
            looked: Cell::new(None),
            installed: Cell::new(0),
            installs: WaitList::default(),
            placing: Budget::new(1),
            homes: RefCell::default(),
        }
    }

    /// Where partitions were before this start, as far as that is known.
    pub fn remember(&self, homes: impl IntoIterator<Item = (PartitionKey, u32)>) {
        let mut known = self.homes.borrow_mut();
        homes.into_iter().for_each(|(key, shard)| known.note(key, shard));
    }

    /// Partition → shard, of those that an image gives this node.
    pub fn place(&self, image: &Image, shards: usize, me: i32) -> PartitionMap<u32> {
        // The coordinator is on shard 0.
        self.homes.borrow_mut().place(image, shards, me, OFFSETS_TOPIC)
    }

    /// Nobody else says where partitions are, nor hands out a new image, while this is kept.
    pub async fn placing(&self) -> Permit {
        self.placing.acquire(1).await
    }

    /// A partition is on another shard now, and all shards are told. To be called by whoever is [`placing`](Self::placing).
    pub async fn moved(&self, node: &Rc<Node>, key: PartitionKey, to: u32) {
        self.homes.borrow_mut().note(key, to);
        let mut view = View::clone(&node.view());
        view.placement.insert(key, to);
        // Only a broker that stops leaves a shard untold.
        let _ = hand_out(node, Arc::new(view)).await;
    }

    /// Decides a change on the latest image and has it agreed on; `decide` returns its records and its answer, and is asked
    /// again if another node's change was first. When this returns, every shard of this node knows all that the answer rests on.
    ///
    /// # Errors
    /// [`MetadataError`], at once while there is no quorum: clients try again. The change may be made later all the same, or not.
    pub async fn change<T>(
        &self,
        node: &Rc<Node>,
        decide: impl Fn(&Image) -> (Vec<MetadataRecord>, T),
    ) -> Result<T, MetadataError> {
        if self.quorum.is_lost() {
            return Err(MetadataError::NoQuorum);
        }
        let _turn = self.turn.acquire(1).await;
        if self.quorum.is_lost() {
            return Err(MetadataError::NoQuorum);
        }
        let (answer, version) = self.quorum.change(&node.host, decide).await?;
        self.wait_installed(node, version).await;
        Ok(answer)
    }

    /// The same for what a client asks for: refused where it is too much for one change ([`size::check`]).
    ///
    /// # Errors
    /// [`Failure`]; unless it was refused, the change may then be made later, or not.
    pub async fn change_for_client<T>(
        &self,
        node: &Rc<Node>,
        decide: impl Fn(&Image) -> (Vec<MetadataRecord>, T),
    ) -> Result<T, Failure> {
        let changed = self.change(node, |image| {
            let (records, answer) = decide(image);
            match size::check(&records) {
                Ok(()) => (records, Ok(answer)),
                Err(refused) => (Vec::new(), Err(refused)),
            }
        });
        Ok(changed.await??)
    }

    /// Has what this cluster itself needs agreed on, in as many changes as it takes; waits a while for a quorum.
    ///
    /// # Errors
    /// [`MetadataError`]; some of it may be made then.
    pub async fn change_in_parts(
        &self,
        node: &Rc<Node>,
        decide: impl Fn(&Image) -> Vec<MetadataRecord>,
    ) -> Result<(), MetadataError> {
        let _turn = self.turn.acquire(1).await;
        let version = self.quorum.change_in_parts(&node.host, decide).await?;
        self.wait_installed(node, version).await;
        Ok(())
    }

    async fn wait_installed(&self, node: &Rc<Node>, version: u64) {
        self.installs
            .wait(|| (self.installed.get() >= version || node.is_stopping()).then_some(()))
            .await;
    }

    /// Waits until every shard of this node has all changes that were answered anywhere before this was called.
    pub async fn catch_up(&self, node: &Rc<Node>) -> CaughtUp {
        if self.quorum.with(|q| q.is_alone()) {
            // Whatever was answered, every shard has.
            return CaughtUp::Yes;
        }
        if self.quorum.is_lost() {
            return CaughtUp::NoQuorum;
        }
        let called = Instant::now();
        let _turn = self.looking.acquire(1).await;
        if let Some((began, answered)) = self.looked.get() {
            if began >= called {
                return answered;
            }
            // Clients may ask for what does not exist as often as they like.
            node.host_sleep((began + LOOK_PAUSE).saturating_duration_since(called))
                .await;
        }
        let began = Instant::now();
        let version = self.quorum.catch_up(&node.host).await;
        let caught_up = match version {
            Some(_) => CaughtUp::Yes,
            None if self.quorum.is_lost() => CaughtUp::NoQuorum,
            None => CaughtUp::NotInTime,
        };
        self.looked.set(Some((began, caught_up)));
        if let Some(version) = version {
            self.wait_installed(node, version).await;
        }
        caught_up
    }

    /// Hands every new image to the shards, as long as the node runs.
    pub async fn run_installs(&self, node: &Rc<Node>) {
        self.installed.set(node.view().image.version);
        self.installs.wake_all();
        loop {
            self.quorum
                .changes()
                .wait(|| {
                    let version = self.quorum.with(|q| q.image().version);
                    (version != self.installed.get() || node.is_stopping()).then_some(())
                })
                .await;
            let _placing = self.placing().await;
            if node.is_stopping() {
                self.installs.wake_all();
                return;
            }
            let before = node.view();
            let image = self.quorum.image();
            let version = image.version;
            let placement = self.place(&image, node.router.shards(), node.shared.node_id);
            let view = Arc::new(View {
                me: node.shared.node_id,
                image,
                placement,
            });
            if hand_out(node, Arc::clone(&view)).await.is_err() {
                return;
            }
            self.installed.set(version);
            self.installs.wake_all();
            node.coordinator()
                .groups
                .metadata_changed(node, &before.image, &view.image);
        }
    }
}

async fn hand_out(node: &Rc<Node>, view: Arc<View>) -> Result<(), Stopping> {
    let install = move |n: Rc<Node>| {
        let view = Arc::clone(&view);
        async move { n.install(view, HashMap::new()) }
    };
    node.router.broadcast(node, install).await
}

/// Proposes a change from any shard; with `validate_only` it is decided and nothing is committed.
///
/// # Errors
/// What `decide` says, or the metadata log's failure.
pub async fn propose<F>(node: &Rc<Node>, validate_only: bool, decide: F) -> Result<(), Failure>
where
    F: Fn(&Node, &Image) -> Result<Vec<MetadataRecord>, Failure> + Send + 'static,
{
    node.router
        .call(node, 0, move |n| async move {
            n.coordinator()
                .controller
                .change_for_client(&n, |image| match decide(&n, image) {
                    Ok(_) if validate_only => (Vec::new(), Ok(())),
                    Ok(records) => (records, Ok(())),
                    Err(failure) => (Vec::new(), Err(failure)),
                })
                .await?
        })
        .await?
}

/// What new topics get where a request leaves it open, and which brokers take their replicas.
#[must_use]
pub fn defaults(node: &Node, image: &Image) -> Defaults {
    let settings = &node.shared.settings;
    let is_drained = |node: i32| image.config(&ConfigResource::Broker(Some(node)), DRAINING) == Some("true");
    let places = image.brokers().map(|b| Place {
        node: b.registration.node,
        rack: b.registration.rack.clone(),
        active: !b.fenced,
    });
    let (drained, brokers): (Vec<Place>, _) = places.partition(|p| is_drained(p.node));
    Defaults {
        brokers,
        draining: drained.iter().map(|p| p.node).collect(),
        partitions: settings.number("num.partitions") as i32,
        replication_factor: settings.number("default.replication.factor") as i16,
    }
}
