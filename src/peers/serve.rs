//! Taking streams of other nodes: who they are is checked before anything they say is looked at.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use millrace_cluster::{
    metadata::{Image, record},
    peer::{Hello, HelloAnswer, StreamKind, VERSIONS, common_version},
};
use millrace_net::quic::{Connection, Endpoint, FrameReceiver, FrameSender, LinkError};

use super::{FRAME_MAX, introduce};
use crate::{address, node::Node, replication::following};

/// Bytes of a stream's first frame at most, before it is known who sends it.
const FIRST_FRAME_MAX: usize = 64 << 10;
/// How long a stream of the quorum waits for this node to become a member.
const PATIENCE: Duration = Duration::from_secs(1);

/// Takes connections on this shard's port as long as the node runs.
pub async fn run(node: Rc<Node>, endpoint: Rc<Endpoint>) {
    while let Some(handshake) = endpoint.accept().await {
        if node.is_stopping() {
            return;
        }
        let node = Rc::clone(&node);
        glommio::spawn_local(async move {
            match handshake.finish().await {
                Ok(connection) => streams(&node, connection).await,
                // As who dials does while this node starts.
                Err(error @ LinkError::GaveUp { .. }) => tracing::debug!(%error, "no node came"),
                Err(error) => {
                    if let Some(before) = node.refused_handshakes.say() {
                        tracing::warn!(%error, before, "a node was refused: its certificate does not hold");
                    }
                }
            }
        })
        .detach();
    }
}

async fn streams(node: &Rc<Node>, connection: Connection) {
    while let Ok((tx, rx)) = connection.accept(FIRST_FRAME_MAX).await {
        let (node, connection) = (Rc::clone(node), connection.clone());
        glommio::spawn_local(async move {
            if let Err(error) = stream(&node, &connection, tx, rx).await {
                tracing::debug!(%error, peer = %connection.address(), "a stream of another node has ended");
            }
        })
        .detach();
    }
}

async fn stream(
    node: &Rc<Node>,
    connection: &Connection,
    mut tx: FrameSender,
    mut rx: FrameReceiver,
) -> Result<(), LinkError> {
    let garbage = |what: &str| LinkError::Garbage(what.into());
    let first = rx.next().await?.ok_or_else(|| garbage("nothing"))?;
    let hello: Hello = record::decode(&first).map_err(|_| garbage("a first frame that is none of ours"))?;
    if hello.kind == StreamKind::Quorum && node.shard == 0 {
        // This node may be about to become a member, too.
        let until = Instant::now() + PATIENCE;
        while node.coordinator.borrow().is_none() && Instant::now() < until {
            node.host_sleep(Duration::from_millis(10)).await;
        }
    }
    let version = match check(node, connection, &hello) {
        Ok(version) => version,
        Err(reason) => {
            tracing::warn!(peer = hello.node, address = %connection.address(), reason, "a node was refused");
            let refused = HelloAnswer::Refused { reason };
            tx.send([vec![record::encode(&refused).into()]]).await?;
            tx.finish();
            return Ok(());
        }
    };
    if hello.kind != StreamKind::Introduce && address::split_told(&hello.address).is_ok() {
        node.contacts.borrow_mut().hear(hello.node, &hello.address);
    }
    let welcome = HelloAnswer::Welcome { version };
    tx.send([vec![record::encode(&welcome).into()]]).await?;
    rx.set_frame_max(FRAME_MAX);
    match hello.kind {
        StreamKind::Quorum => {
            while let Some(frame) = rx.next().await? {
                let quorum = Rc::clone(&node.coordinator().controller.quorum);
                if let Err(error) = quorum.receive(hello.node, &frame) {
                    tracing::warn!(peer = hello.node, %error, "a node's message was refused, and its link closed");
                    connection.close("a message that cannot be");
                    return Err(garbage("a message that cannot be"));
                }
            }
            Ok(())
        }
        StreamKind::Introduce => {
            let said = introduce::answer(node, &hello).await;
            tx.send([vec![record::encode(&said).into()]]).await?;
            tx.finish();
            // It goes when it has read this.
            let _ = rx.next().await;
            Ok(())
        }
        StreamKind::Replica => following::serve(node, hello.node, version, tx, rx).await,
    }
}

fn is_old_copy(image: &Image, hello: &Hello) -> bool {
    let known = image.broker(hello.node).map(|b| &b.registration);
    known.is_some_and(|r| r.directory == hello.directory && r.start > hello.start)
}

/// Why a stream is refused, if it is; else the version to speak.
fn check(node: &Rc<Node>, connection: &Connection, hello: &Hello) -> Result<u16, String> {
    let me = node.shared.node_id;
    let version = common_version(VERSIONS, hello.versions).ok_or_else(|| {
        format!(
            "it speaks versions {} to {} between nodes, this one {} to {}: upgrade the older one first to a release that speaks both",
            hello.versions.0, hello.versions.1, VERSIONS.0, VERSIONS.1
        )
    })?;
    if !connection.is_node(hello.node) {
        return Err(format!(
            "it says that it is node {}, and its certificate says otherwise",
            hello.node
        ));
    }
    if hello.node == me {
        return Err(format!(
            "node.id {me} is this node's own: give each node an id of its own"
        ));
    }
    if hello.to_node != me {
        return Err(format!(
            "it looks for node {}, this is node {me}: check the addresses in --peers",
            hello.to_node
        ));
    }
    if hello.to_shard as usize != node.shard {
        return Err(format!(
            "it looks for shard {}, this is shard {}",
            hello.to_shard, node.shard
        ));
    }
    if hello.kind == StreamKind::Quorum && node.coordinator.borrow().is_none() {
        return Err(format!("node {me} has not joined yet"));
    }
    let ours = node.cluster_id();
    if !ours.is_empty() && !hello.cluster_id.is_empty() && ours != hello.cluster_id {
        return Err(format!(
            "it belongs to cluster {}, this node to {ours}: a data folder keeps its cluster",
            hello.cluster_id
        ));
    }
    let image = node.known_image();
    match image.member(hello.node) {
        // It asks to come in, or this node is not in itself yet.
        _ if hello.kind == StreamKind::Introduce || image.members().next().is_none() => {}
        // A member is a node on its folder: with another one it has forgotten how it voted.
        Some(member) if member.directory != hello.directory => {
            return Err(format!(
                "node {} has joined the cluster with another data folder since: empty this one, or give the node an id of its own",
                hello.node
            ));
        }
        Some(_) if is_old_copy(&image, hello) => {
            return Err(format!(
                "the data folder of node {} is an old copy: empty it and start again, what it lacks will be copied to it",
                hello.node
            ));
        }
        None if node.hears_a_leader() => {
            return Err(format!(
                "node {} is no member of the cluster: it was removed. With an emptied folder it can join anew",
                hello.node
            ));
        }
        _ => {}
    }
    Ok(version)
}
