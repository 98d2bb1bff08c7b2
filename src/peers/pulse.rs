//! A TCP connection to each other member that carries nothing. When a process dies its kernel closes it at once, which says so
//! long before silence does. It is a hint only: who is heard of all the same is alive, and where no such connection comes
//! about, silence must do.

use std::{
    io::ErrorKind,
    net::{IpAddr, TcpListener},
    rc::Rc,
    time::{Duration, Instant},
};

use futures_lite::AsyncReadExt;
use glommio::net::TcpStream;
use millrace_engine::host::Host;

use super::dial;
use crate::node::Node;

/// Pause before a connection is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Connections held at once; further ones are closed.
const HELD_MAX: usize = 1_024;
/// The same for one address, so that a single host cannot take the places of all members.
const HELD_MAX_PER_ADDRESS: usize = 64;
/// A connection that ends sooner was not held: its end says nothing about the process at the other side.
const HELD_FOR_MIN: Duration = Duration::from_secs(1);

/// Holds the connections of others until they close them, in a thread of its own.
///
/// Not on a shard: what a shard reads from is referred to by its ring, and when a process is killed the kernel closes such
/// sockets only as it takes the ring apart, up to 10 ms after those that nothing refers to. Clients must not be the first to know.
///
/// # Errors
/// No thread can be made.
pub fn hold(socket: TcpListener) -> std::io::Result<()> {
    socket.set_nonblocking(false)?;
    std::thread::Builder::new().name("pulse".into()).spawn(move || {
        let mut held: Vec<(IpAddr, std::net::TcpStream)> = Vec::new();
        loop {
            let Ok((stream, from)) = socket.accept() else {
                std::thread::sleep(RETRY);
                continue;
            };
            // Nothing is due; whoever sends something is no node.
            held.retain(|(_, s)| s.peek(&mut [0; 1]).is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
            let of_address = held.iter().filter(|(address, _)| *address == from.ip()).count();
            let has_place = held.len() < HELD_MAX && of_address < HELD_MAX_PER_ADDRESS;
            if has_place && stream.set_nonblocking(true).is_ok() {
                held.push((from.ip(), stream));
            }
        }
    })?;
    Ok(())
}

/// Watches one other member.
pub async fn watch(node: Rc<Node>, peer: i32) {
    while !node.is_stopping() && is_member(&node, peer) {
        if let Ok(address) = dial::first_shard(&node, peer).await
            && let Ok(mut stream) = TcpStream::connect(address).await
        {
            mark(&node, peer, false).await;
            let began = Instant::now();
            let _ = stream.read(&mut [0; 1]).await;
            if began.elapsed() >= HELD_FOR_MIN && !node.is_stopping() {
                tracing::debug!(peer, "a member's process has closed what only its death closes");
                mark(&node, peer, true).await;
                let quorum = Rc::clone(&node.coordinator().controller.quorum);
                quorum.reconnect(peer);
                quorum.suspect(&node.host, peer).await;
                if !quorum.is_suspected(peer) {
                    mark(&node, peer, false).await;
                }
            }
        }
        node.host.sleep(RETRY).await;
    }
}

fn is_member(node: &Node, peer: i32) -> bool {
    let coordinator = node.coordinator();
    let quorum = &coordinator.controller.quorum;
    quorum.with(|q| !q.knows_members() || q.image().member(peer).is_some())
}

/// Every shard tells clients of it.
async fn mark(node: &Rc<Node>, peer: i32, suspected: bool) {
    let marked = node.router.broadcast(node, move |n| async move {
        if suspected {
            n.suspects.borrow_mut().insert(peer);
            n.replication.reconnect(peer);
        } else {
            n.suspects.borrow_mut().remove(&peer);
        }
    });
    // Only a stop is in the way, and then nothing is told any more.
    let _ = marked.await;
}
