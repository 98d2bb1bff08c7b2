//! How a node with a new folder comes into a cluster: it asks the nodes it was told of until one is in a cluster already, and
//! takes it in, or until all are there to begin one. The decision is [`arrive`]'s.

use std::{cell::RefCell, collections::BTreeMap, io::ErrorKind, rc::Rc, time::Duration};

use glommio::net::TcpStream;

use millrace_cluster::{
    controller::members::{self, Joining},
    metadata::record,
    peer::{Arrival, Heard, Hello, Introduction, StreamKind, arrive},
};
use millrace_engine::sync::WaitList;
use millrace_net::quic::LinkError;

use super::dial;
use crate::node::Node;

/// Pause before a node is asked again.
const AGAIN: Duration = Duration::from_millis(50);
/// How long an answer may take: the cluster may have to elect a leader first.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a process that may still run has to take a connection.
const PROBE: Duration = Duration::from_secs(1);
/// How often the log says what is waited for.
const TELL: Duration = Duration::from_secs(10);
/// How long nothing is said of it at first.
const TELL_FIRST: Duration = Duration::from_secs(1);

/// Finds out where a new folder belongs; `None` if the broker is told to stop before that.
pub async fn find_cluster(node: &Rc<Node>) -> Option<Arrival> {
    let shared = &node.shared;
    let me = shared.node_id;
    let founders: Vec<i32> = shared.members.addresses.keys().copied().collect();
    let directory = shared.directory_id.into_bytes();
    let address = shared.members.own_address(me);
    let heard: Rc<RefCell<BTreeMap<i32, Introduction>>> = Rc::default();
    let news: Rc<WaitList> = Rc::default();
    node.arriving.set(true);
    let mut asking = Vec::new();
    for peer in founders.iter().copied().filter(|n| *n != me) {
        let (node, heard, news) = (Rc::clone(node), Rc::clone(&heard), Rc::clone(&news));
        asking.push(glommio::spawn_local(async move {
            loop {
                match ask(&node, peer).await {
                    Ok(said) => {
                        heard.borrow_mut().insert(peer, said);
                    }
                    Err(error) => {
                        tracing::debug!(peer, %error, "a node cannot be asked about the cluster");
                        heard.borrow_mut().remove(&peer);
                    }
                }
                news.wake_all();
                node.host_sleep(AGAIN).await;
            }
        }));
    }
    let decided = || {
        let heard: Vec<Heard> = (heard.borrow().iter())
            .map(|(node, said)| Heard {
                node: *node,
                said: said.clone(),
            })
            .collect();
        arrive(me, directory, &address, &founders, &heard)
    };
    let arrived = news.wait(|| Some(decided()).filter(|a| !matches!(a, Arrival::Wait(_))));
    let telling = async {
        node.host_sleep(TELL_FIRST).await;
        loop {
            if let Arrival::Wait(reason) = decided() {
                tracing::warn!("waiting for a cluster: {reason}");
            }
            node.host_sleep(TELL).await;
        }
    };
    let stopped = async {
        node.stop.wait(|| node.is_stop_wanted().then_some(())).await;
        None
    };
    let arrival = futures_lite::future::or(
        async { Some(arrived.await) },
        futures_lite::future::or(telling, stopped),
    );
    let arrival = arrival.await;
    node.arriving.set(false);
    for task in asking {
        task.cancel().await;
    }
    arrival
}

async fn ask(node: &Rc<Node>, peer: i32) -> Result<Introduction, LinkError> {
    let asked = async {
        let mut stream = dial::open(node, peer, 0, StreamKind::Introduce).await?;
        let garbage = || LinkError::Garbage("no introduction".into());
        let frame = stream.rx.next().await?.ok_or_else(garbage)?;
        let said = record::decode(&frame).map_err(|_| garbage());
        stream.connection.close("that was all");
        said
    };
    let patience = async {
        node.host_sleep(PATIENCE).await;
        Err(LinkError::Lost(format!("node {peer} does not answer")))
    };
    futures_lite::future::or(asked, patience).await
}

/// Whether the machine at an address says that no process listens there ([`pulse`](super::pulse)). A process that is stopped still
/// takes connections, and one that is cut off says nothing.
async fn is_refused(node: &Rc<Node>, address: &str) -> bool {
    let connecting = async {
        let address = dial::resolve(address).await.ok()?;
        Some(
            matches!(TcpStream::connect(address).await, Err(glommio::GlommioError::IoError(e)) if e.kind() == ErrorKind::ConnectionRefused),
        )
    };
    let patience = async {
        node.host_sleep(PROBE).await;
        None
    };
    futures_lite::future::or(connecting, patience).await.unwrap_or(false)
}

/// What this node says to one whose folder is new.
pub async fn answer(node: &Rc<Node>, hello: &Hello) -> Introduction {
    let not_now = |reason: String| Introduction::NotNow { reason };
    let coordinator = node.coordinator.borrow().clone();
    let Some(coordinator) = coordinator else {
        let shared = &node.shared;
        return match node.arriving.get() {
            true => Introduction::New {
                directory: shared.directory_id.into_bytes(),
                address: shared.members.own_address(shared.node_id),
                founders: shared.members.addresses.keys().copied().collect(),
            },
            false => not_now("it is starting".into()),
        };
    };
    let quorum = &coordinator.controller.quorum;
    if !quorum.with(|q| q.knows_members()) {
        return not_now("it is joining a cluster itself".into());
    }
    let mut joining = Joining {
        node: hello.node,
        directory: hello.directory,
        address: hello.address.clone(),
        old_is_gone: false,
    };
    let image = quorum.image();
    if let Some(address) = members::may_live(&image, &joining) {
        joining.old_is_gone = is_refused(node, address).await;
    }
    let joined = quorum.change(&node.host, |image| match members::join(image, &joining) {
        Ok(records) => (records, Ok(())),
        Err(error) => (Vec::new(), Err(error)),
    });
    match joined.await {
        Ok((Ok(()), _)) => {}
        Ok((Err(refused), _)) => return not_now(refused.to_string()),
        Err(error) => return not_now(error.to_string()),
    }
    let image = quorum.image();
    match image.member(hello.node) {
        Some(member) => {
            tracing::info!(
                peer = hello.node,
                address = hello.address,
                "a node is a member of this cluster"
            );
            Introduction::Member {
                cluster_id: image.cluster_id.clone(),
                generation: member.generation,
                members: image.members().map(|m| (m.node, m.address.clone())).collect(),
            }
        }
        None => not_now("it was removed at once".into()),
    }
}
