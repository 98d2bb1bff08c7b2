//! One client's connection: requests in, answers out in the same order.
//!
//! Produce requests are worked on side by side (the answer waits for the disk; the appends are in order); every other
//! request waits until those before it are answered, as a Kafka broker does for all.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::atomic::Ordering,
};

use bytes::{Bytes, BytesMut};
use glommio::net::TcpStream;
use kafka_protocol::messages::{ApiKey, RequestKind};
use millrace_engine::sync::WaitList;
use millrace_net::{
    kafka::codec::{self, DecodeError, Request},
    listener::{self, Writer},
};

use super::dispatch::{self, Reply};
use crate::node::Node;

/// Answers gathered into one write.
const WRITE_BYTES: usize = 256 << 10;

/// Who is connected.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// It connected to this core's own port: to a broker that has this core's partitions only.
    pub to_core: bool,
    /// It has sent neither Metadata nor Produce requests before this one.
    pub has_only_come: bool,
}

/// An answer's place in the order.
#[derive(Default)]
struct Place {
    done: Cell<bool>,
    bytes: RefCell<Option<BytesMut>>,
}

#[derive(Default)]
struct Answers {
    places: RefCell<VecDeque<Rc<Place>>>,
    changed: WaitList,
    /// Produce requests being worked on.
    in_flight: Cell<usize>,
    /// No more answers will come, or none can be sent.
    closed: Cell<bool>,
}

impl Answers {
    fn place(&self) -> Rc<Place> {
        let place = Rc::new(Place::default());
        self.places.borrow_mut().push_back(Rc::clone(&place));
        place
    }

    fn fill(&self, place: &Place, bytes: Option<BytesMut>) {
        *place.bytes.borrow_mut() = bytes;
        place.done.set(true);
        self.changed.wake_all();
    }
}

/// Serves a connection until either side closes it.
pub async fn serve(node: Rc<Node>, stream: TcpStream, to_core: bool) {
    let open = node.shared.connections.fetch_add(1, Ordering::Relaxed);
    let limit = node.shared.settings.number("max.connections") as usize;
    if open < limit {
        if let Ok(address) = stream.peer_addr() {
            let mut peer = Peer {
                address,
                to_core,
                has_only_come: true,
            };
            if let Err(error) = run(&node, stream, &mut peer).await {
                log_end(&peer, &error);
            }
        }
    } else {
        tracing::warn!(limit, "a connection was closed: max.connections is reached");
    }
    node.shared.connections.fetch_sub(1, Ordering::Relaxed);
}

fn log_end(peer: &Peer, error: &io::Error) {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            tracing::debug!(peer = %peer.address, %error, "connection ended");
        }
        _ => tracing::warn!(peer = %peer.address, %error, "connection closed"),
    }
}

async fn run(node: &Rc<Node>, stream: TcpStream, peer: &mut Peer) -> io::Result<()> {
    let frame_limit = node.shared.settings.number("socket.request.max.bytes") as usize;
    let (mut reader, writer) = listener::split(stream, frame_limit);
    let answers = Rc::new(Answers::default());
    let sender = glommio::spawn_local(send_answers(Rc::clone(&answers), writer)).detach();
    let result = read_requests(node, &mut reader, &answers, peer).await;
    answers.closed.set(true);
    answers.changed.wake_all();
    let sent = sender.await.unwrap_or(Ok(()));
    result.and(sent)
}

async fn read_requests<R: futures_lite::AsyncRead + Unpin>(
    node: &Rc<Node>,
    reader: &mut listener::FrameReader<R>,
    answers: &Rc<Answers>,
    peer: &mut Peer,
) -> io::Result<()> {
    let in_flight_max = node.shared.settings.number("max.inflight.requests.per.connection") as usize;
    while !answers.closed.get() {
        let Some(length) = reader.next_length().await? else {
            return Ok(());
        };
        // Large requests wait for room before they are read; small ones would gain nothing from waiting.
        let permit = node.requests.acquire(length as u64).await;
        let frame = reader.frame(length).await?;
        let request = match codec::decode(frame) {
            Ok(request) => request,
            Err(DecodeError::UnsupportedVersion {
                api: ApiKey::ApiVersions,
                correlation_id,
                ..
            }) => {
                let place = answers.place();
                answers.fill(&place, Some(dispatch::unsupported_api_versions(correlation_id)));
                continue;
            }
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        let below = match request.api {
            ApiKey::Produce => in_flight_max,
            _ => 1,
        };
        answers
            .changed
            .wait(|| (answers.in_flight.get() < below || answers.closed.get()).then_some(()))
            .await;
        let place = answers.place();
        let introduces = matches!(request.api, ApiKey::Produce | ApiKey::Metadata);
        let (version, id, frame_len) = (request.version, request.correlation_id, request.frame_len);
        match request {
            Request {
                body: RequestKind::Produce(body),
                ..
            } => {
                answers.in_flight.set(answers.in_flight.get() + 1);
                node.in_flight.set(node.in_flight.get() + 1);
                let (node, answers) = (Rc::clone(node), Rc::clone(answers));
                glommio::spawn_local(async move {
                    let reply = dispatch::produce(&node, version, id, frame_len, body).await;
                    drop(permit);
                    answers.in_flight.set(answers.in_flight.get() - 1);
                    node.in_flight.set(node.in_flight.get() - 1);
                    finish(&answers, &place, reply);
                })
                .detach();
            }
            other => {
                let reply = dispatch::handle(node, other, peer).await;
                drop(permit);
                finish(answers, &place, reply);
            }
        }
        peer.has_only_come &= !introduces;
    }
    Ok(())
}

fn finish(answers: &Answers, place: &Place, reply: Reply) {
    match reply {
        Reply::Bytes(bytes) => answers.fill(place, Some(bytes)),
        Reply::Nothing => answers.fill(place, None),
        Reply::Close => {
            answers.closed.set(true);
            answers.fill(place, None);
        }
    }
}

async fn send_answers(answers: Rc<Answers>, mut writer: Writer) -> io::Result<()> {
    loop {
        let mut next = answers
            .changed
            .wait(|| {
                let mut gathered: Option<BytesMut> = None;
                let mut places = answers.places.borrow_mut();
                while places.front().is_some_and(|p| p.done.get()) {
                    let bytes = places.pop_front().and_then(|p| p.bytes.borrow_mut().take());
                    match (&mut gathered, bytes) {
                        (_, None) => {}
                        (None, bytes) => gathered = bytes,
                        (Some(all), Some(bytes)) => all.extend_from_slice(&bytes),
                    }
                    if gathered.as_ref().is_some_and(|g| g.len() >= WRITE_BYTES) {
                        break;
                    }
                }
                if gathered.is_some() {
                    return Some(gathered);
                }
                (answers.closed.get() && places.is_empty()).then_some(None)
            })
            .await
            .map(BytesMut::freeze);
        let Some(bytes) = next.take() else {
            // The peer may have gone first.
            let _ = futures_lite::AsyncWriteExt::close(&mut writer).await;
            return Ok(());
        };
        if let Err(error) = send(&mut writer, bytes).await {
            answers.closed.set(true);
            answers.changed.wake_all();
            return Err(error);
        }
    }
}

async fn send(writer: &mut Writer, bytes: Bytes) -> io::Result<()> {
    listener::send(writer, &bytes).await
}
