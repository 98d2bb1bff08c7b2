//! What a node does about brokers: it registers itself, and while it leads the quorum it fences those that do not answer.

use std::{rc::Rc, time::Duration};

use millrace_cluster::{
    controller::{
        brokers::{self, IsrChange},
        members::{self, Joining},
        reassign, size,
    },
    metadata::{Image, MetadataRecord, Registration},
    peer::StreamKind,
};
use millrace_engine::host::Host;

use super::{
    controller::{self, CaughtUp},
    quorum::MetadataError,
};
use crate::{
    kafka::errors::Failure,
    node::{Node, OFFSETS_TOPIC},
    peers::dial,
};

/// How often a leader of the quorum looks for brokers that do not answer.
const LOOK: Duration = Duration::from_millis(20);
/// How often others look whether they were fenced.
const LOOK_IDLY: Duration = Duration::from_millis(100);
/// How often a leader of the quorum looks whether the offsets topic has all its replicas.
const LOOK_FOR_SHORT: Duration = Duration::from_secs(5);
/// Pause after a registration that failed.
const RETRY: Duration = Duration::from_millis(200);

/// Registers this node, as often as it takes.
///
/// # Errors
/// It is refused: another broker has its id.
pub async fn register(node: &Rc<Node>, registration: &Registration) -> Result<(), Failure> {
    let quorum = Rc::clone(&node.coordinator().controller.quorum);
    let shared = &node.shared;
    let at = Joining {
        node: shared.node_id,
        directory: registration.directory,
        address: shared.members.own_address(shared.node_id),
        old_is_gone: false,
    };
    let mut told = false;
    // A member that has just joined first has to be sent what the others know.
    let knows = || {
        quorum
            .with(|q| q.knows_members() && q.image().version > 0)
            .then_some(())
    };
    quorum.changes().wait(knows).await;
    loop {
        let done = quorum
            .change(&node.host, |image| {
                let decided = brokers::register(image, registration).and_then(|mut records| {
                    let is_part = size::take_part(&mut records);
                    // It may be somewhere else than it was.
                    records.extend(members::join(image, &at)?);
                    Ok((records, is_part))
                });
                match decided {
                    Ok((records, is_part)) => (records, Ok(is_part)),
                    Err(refused) => (Vec::new(), Err(refused)),
                }
            })
            .await;
        // The rest is what follows from its taking part.
        let done = match done {
            Ok((Ok(true), _)) => {
                let rest = quorum.change_in_parts(&node.host, |image| brokers::settle(image, |_| true));
                rest.await.map(|_| Ok(()))
            }
            Ok((done, _)) => Ok(done.map(drop)),
            Err(error) => Err(error),
        };
        match done {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(refused)) => return Err(refused.into()),
            Err(MetadataError::NoQuorum) if !node.is_stop_wanted() => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        "waiting for a majority of the metadata quorum: {}",
                        MetadataError::NoQuorum
                    );
                    ask_why(node).await;
                }
            }
            Err(error) => return Err(error.into()),
        }
        node.host.sleep(RETRY).await;
    }
}

/// Lets the log say what the other members have against this node, if they answer: one that only listens has nothing to tell them, and so
/// is not told either that it was removed.
async fn ask_why(node: &Rc<Node>) {
    let me = node.shared.node_id;
    let members: Vec<i32> = node.known_image().members().map(|m| m.node).collect();
    if !node.shared.members.is_cluster() {
        return;
    }
    for peer in members.into_iter().filter(|n| *n != me) {
        if let Err(error) = dial::open(node, peer, 0, StreamKind::Quorum).await {
            tracing::warn!(peer, %error, "a member of the metadata quorum");
        }
    }
}

/// Replicas that the offsets topic lacks because it was created when there were fewer brokers.
fn widen_offsets(node: &Node, image: &Image) -> Vec<MetadataRecord> {
    let Some(topic) = image.topic(OFFSETS_TOPIC) else {
        return Vec::new();
    };
    let factor = node.shared.settings.number("offsets.topic.replication.factor") as usize;
    reassign::widen(image, topic, factor, &controller::defaults(node, image).brokers)
}

/// Fences brokers that do not answer while this node leads the quorum, lets preferred leaders lead again, gives the offsets topic
/// the replicas that it lacks, and registers this node again when it was fenced itself.
pub async fn run(node: &Rc<Node>, registration: Registration) {
    let settings = &node.shared.settings;
    let timeout = Duration::from_millis(settings.number("broker.session.timeout.ms") as u64);
    let balance_every = Duration::from_secs(settings.number("leader.imbalance.check.interval.seconds") as u64);
    let balance = settings.flag("auto.leader.rebalance.enable");
    let me = node.shared.node_id;
    let coordinator = node.coordinator();
    let controller = &coordinator.controller;
    let mut balanced = std::time::Instant::now();
    let mut looked_for_short = balanced;
    while !node.is_stopping() {
        let leads = controller.quorum.is_leader();
        // A death may be what made this node lead: whoever has died is fenced at once then.
        let elected = controller
            .quorum
            .changes()
            .wait(|| (!leads && controller.quorum.is_leader()).then_some(()));
        futures_lite::future::or(elected, node.host.sleep(if leads { LOOK } else { LOOK_IDLY })).await;
        let fenced = controller
            .quorum
            .with(|q| q.image().broker(me).is_some_and(|b| b.fenced));
        if fenced && !node.is_stop_wanted() {
            tracing::warn!("this broker was fenced: it did not answer in time; it registers again");
            if let Err(failure) = register(node, &registration).await {
                tracing::error!(error = failure.message, "the registration was refused");
                node.host.sleep(RETRY).await;
            }
        }
        if !controller.quorum.is_leader() {
            continue;
        }
        if let Err(error) = controller.quorum.settle_members() {
            tracing::warn!(%error, "the members of the metadata quorum could not be changed");
        }
        let silent: Vec<i32> = controller.quorum.with(|q| q.image().active().collect::<Vec<_>>());
        let silent = silent.into_iter().filter(|n| {
            *n != me
                && (controller.quorum.is_suspected(*n)
                    || controller.quorum.silence(*n).is_some_and(|silence| silence > timeout))
        });
        for broker in silent.collect::<Vec<_>>() {
            tracing::warn!(broker, "a broker does not answer and is fenced");
            let fenced = controller.change_in_parts(node, |image| brokers::fence(image, broker));
            if let Err(error) = fenced.await {
                tracing::warn!(broker, %error, "it could not be fenced");
            }
        }
        if balance && balanced.elapsed() >= balance_every {
            balanced = std::time::Instant::now();
            let elected = controller.change_in_parts(node, |image| brokers::elect_preferred(image, |_, _| true));
            if let Err(error) = elected.await {
                tracing::warn!(%error, "preferred leaders could not be elected");
            }
        }
        if looked_for_short.elapsed() >= LOOK_FOR_SHORT {
            looked_for_short = std::time::Instant::now();
            let partitions = controller.quorum.with(|q| widen_offsets(node, q.image()).len());
            if partitions > 0 {
                tracing::info!(
                    partitions,
                    "{OFFSETS_TOPIC} has fewer replicas than offsets.topic.replication.factor says: more are taken on"
                );
                let widened = controller.change_in_parts(node, |image| widen_offsets(node, image));
                if let Err(error) = widened.await {
                    tracing::warn!(%error, "{OFFSETS_TOPIC} could not be given more replicas");
                }
            }
        }
    }
}

/// Before a stop: others lead what this broker led (KIP-112's controlled shutdown).
pub async fn resign(node: &Rc<Node>) {
    let me = node.shared.node_id;
    let quorum = Rc::clone(&node.coordinator().controller.quorum);
    let alone = quorum.with(|q| q.is_alone() || q.image().active().all(|n| n == me));
    if alone {
        return;
    }
    let fenced = quorum.change_in_parts(&node.host, |image| brokers::fence(image, me));
    let patience = async {
        node.host.sleep(Duration::from_secs(2)).await;
        Err(MetadataError::NoQuorum)
    };
    if let Err(error) = futures_lite::future::or(fenced, patience).await {
        tracing::warn!(%error, "this broker's leaderships could not be handed on before the stop");
    }
    quorum.hand_over();
    node.host.sleep(Duration::from_millis(50)).await;
}

/// Tells the controller that this node's logs of some partitions have failed, from any of its shards.
///
/// # Errors
/// [`Failure`]; nothing has changed then, or it will be seen later.
pub async fn give_up(node: &Rc<Node>, partitions: Vec<(uuid::Uuid, u32)>) -> Result<(), Failure> {
    let me = node.shared.node_id;
    change(node, move |image| brokers::give_up(image, me, &partitions)).await
}

/// Has this node lead a partition that it leads under a new epoch, from any of its shards.
///
/// # Errors
/// [`Failure`]; nothing has changed then, or it will be seen later.
pub async fn lead_anew(node: &Rc<Node>, topic: uuid::Uuid, partition: u32) -> Result<(), Failure> {
    let me = node.shared.node_id;
    change(node, move |image| brokers::lead_anew(image, me, topic, partition)).await
}

/// Asks the controller for other ISRs of partitions that this node leads, from any of its shards.
///
/// # Errors
/// [`Failure`]; nothing has changed then, or it will be seen later.
pub async fn alter_isr(node: &Rc<Node>, changes: Vec<IsrChange>) -> Result<(), Failure> {
    let me = node.shared.node_id;
    change(node, move |image| brokers::alter_isr(image, me, &changes)).await
}

async fn change(node: &Rc<Node>, make: impl Fn(&Image) -> Vec<MetadataRecord> + Send + 'static) -> Result<(), Failure> {
    let changed = node.router.call(node, 0, move |n| async move {
        let coordinator = n.coordinator();
        coordinator.controller.change_in_parts(&n, make).await
    });
    changed.await?.map_err(Failure::from)
}

/// Makes sure that nobody counts on this node's copy of a partition, from any of its shards: it is in no ISR and not eligible,
/// `leader` leads, and that is agreed on. False if it is not so, or not known.
pub async fn is_spare(node: &Rc<Node>, topic: uuid::Uuid, partition: u32, leader: i32) -> bool {
    if give_up(node, vec![(topic, partition)]).await.is_err() {
        return false;
    }
    let me = node.shared.node_id;
    let spare = node.router.call(node, 0, move |n| async move {
        let coordinator = n.coordinator();
        let controller = &coordinator.controller;
        controller.catch_up(&n).await == CaughtUp::Yes
            && controller.quorum.with(|q| {
                (q.image().partition(&topic, partition))
                    .is_some_and(|p| p.leader == leader && !p.isr.contains(&me) && !p.elr.contains(&me))
            })
    });
    spare.await.unwrap_or(false)
}
