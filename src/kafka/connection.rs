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
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use glommio::net::TcpStream;
use kafka_protocol::messages::{ApiKey, RequestKind};
use millrace_engine::sync::{Permit, WaitList};
use millrace_net::{
    kafka::codec::{self, DecodeError, Request},
    listener::{self, Writer},
};

use super::{
    dispatch::{self, Reply},
    handlers::produce,
    hangups::Hangup,
    intake,
};
use crate::node::Node;

/// Answers gathered into one write; while so much is unsent no further request is read.
const WRITE_BYTES: usize = 256 << 10;

/// What comes so soon after the first answer that tells who leads was sent before that was known: librdkafka asks twice at once.
const GREETING: Duration = Duration::from_millis(100);

/// Who is connected.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// It connected to this core's own port: to a broker that has this core's partitions only.
    pub to_core: bool,
    /// It has sent neither Metadata nor Produce requests before this one, or none that it can have acted on.
    pub has_only_come: bool,
    /// Whether it has hung up.
    pub hangup: Arc<Hangup>,
}

/// An answer's place in the order; empty until it is there.
type Place = RefCell<Option<Reply>>;

#[derive(Default)]
struct Answers {
    places: RefCell<VecDeque<Rc<Place>>>,
    changed: WaitList,
    /// Produce requests being worked on.
    in_flight: Cell<usize>,
    /// Bytes of answers that are there and not sent.
    unsent: Cell<usize>,
    /// No more answers will come, or none can be sent.
    closed: Cell<bool>,
}

impl Answers {
    fn place(&self) -> Rc<Place> {
        let place = Rc::new(Place::default());
        self.places.borrow_mut().push_back(Rc::clone(&place));
        place
    }

    fn fill(&self, place: &Place, reply: Reply) {
        if matches!(reply, Reply::Close) {
            self.closed.set(true);
        }
        self.unsent.set(self.unsent.get() + reply.size());
        place.replace(Some(reply));
        self.changed.wake_all();
    }

    fn has_room(&self) -> bool {
        self.unsent.get() < WRITE_BYTES
    }

    fn sent(&self, bytes: usize) {
        let had_room = self.has_room();
        self.unsent.set(self.unsent.get() - bytes);
        if !had_room && self.has_room() {
            self.changed.wake_all();
        }
    }

    /// Takes what is to be sent next; `None` before there is any.
    fn gather(&self) -> Option<Gathered> {
        let mut gathered = Gathered::default();
        let mut places = self.places.borrow_mut();
        while gathered.len() < WRITE_BYTES
            && let Some(reply) = places.front().and_then(|place| place.take())
        {
            gathered.add(reply);
            places.pop_front();
        }
        (gathered.len() > 0).then_some(gathered)
    }
}

/// Answers that are sent together.
#[derive(Default)]
struct Gathered {
    /// What comes first, already in pieces.
    pieces: VecDeque<Bytes>,
    pieces_len: usize,
    /// What follows: small answers, side by side.
    last: BytesMut,
    /// Their part of the room for answers.
    permits: Vec<Permit>,
}

impl Gathered {
    fn len(&self) -> usize {
        self.pieces_len + self.last.len()
    }

    fn add(&mut self, reply: Reply) {
        let size = reply.size();
        match reply {
            Reply::Bytes(bytes) if self.last.is_empty() => self.last = bytes,
            Reply::Bytes(bytes) => self.last.extend_from_slice(&bytes),
            Reply::Pieces(pieces, permit) => {
                self.end_piece();
                self.pieces_len += size;
                self.pieces.extend(pieces);
                self.permits.push(permit);
            }
            Reply::Nothing | Reply::Close => {}
        }
    }

    fn end_piece(&mut self) {
        if !self.last.is_empty() {
            self.pieces_len += self.last.len();
            self.pieces.push_back(std::mem::take(&mut self.last).freeze());
        }
    }

    async fn send(mut self, writer: &mut Writer) -> io::Result<()> {
        if self.pieces.is_empty() {
            return writer.send(&self.last).await;
        }
        self.end_piece();
        writer.send_pieces(self.pieces).await
    }
}

/// Serves a connection until either side closes it.
pub async fn serve(node: Rc<Node>, stream: TcpStream, to_core: bool) {
    let open = node.shared.connections.fetch_add(1, Ordering::Relaxed);
    let limit = node.shared.connections_max;
    if open < limit {
        if let Ok(address) = stream.peer_addr()
            && let Err(error) = run(&node, stream, address, to_core).await
        {
            log_end(&node, address, &error);
        }
    } else if let Some(before) = node.refusals.say() {
        tracing::warn!(
            limit,
            before,
            "connections are closed at once: as many are open as max.connections and `ulimit -n` allow"
        );
    }
    node.shared.connections.fetch_sub(1, Ordering::Relaxed);
}

fn log_end(node: &Node, peer: SocketAddr, error: &io::Error) {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            tracing::debug!(%peer, %error, "connection ended");
        }
        _ => {
            if let Some(before) = node.bad_connections.say() {
                tracing::warn!(%peer, %error, before, "a client's connection was closed");
            }
        }
    }
}

async fn run(node: &Rc<Node>, stream: TcpStream, address: SocketAddr, to_core: bool) -> io::Result<()> {
    let frame_limit = node.shared.settings.number("socket.request.max.bytes") as usize;
    let (mut reader, writer) = listener::split(stream, frame_limit);
    node.connections.add(address, reader.traffic());
    let watch = reader
        .traffic()
        .socket()
        .map(|socket| node.shared.hangups.watch(socket));
    let mut peer = Peer {
        address,
        to_core,
        has_only_come: true,
        hangup: watch.as_ref().map_or_else(Arc::default, |w| Arc::clone(&w.hangup)),
    };
    let answers = Rc::new(Answers::default());
    let sender = glommio::spawn_local(send_answers(Rc::clone(&answers), writer)).detach();
    let result = read_requests(node, &mut reader, &answers, &mut peer).await;
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
    let mut introduced: Option<Instant> = None;
    let in_flight_max = node.shared.settings.number("max.inflight.requests.per.connection") as usize;
    while !answers.closed.get() {
        answers
            .changed
            .wait(|| (answers.has_room() || answers.closed.get()).then_some(()))
            .await;
        let Some(length) = reader.next_length().await? else {
            return Ok(());
        };
        let mut held = node.requests.begin(length);
        let frame = reader
            .frame(length, async |needed, useful| held.grow(needed, useful).await)
            .await?;
        let checked = match codec::check(frame) {
            Ok(checked) => checked,
            Err(DecodeError::UnsupportedVersion {
                api: ApiKey::ApiVersions,
                correlation_id,
                ..
            }) => {
                let place = answers.place();
                answers.fill(&place, dispatch::unsupported_api_versions(correlation_id));
                continue;
            }
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        held = intake::for_elements(node, held, length, checked.elements()).await?;
        let request = checked
            .decode()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
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
                // In order: of two batches the one that takes longer to check may be the first.
                let prepared = produce::prepare(node, version, frame_len, body).await;
                answers.in_flight.set(answers.in_flight.get() + 1);
                node.in_flight.set(node.in_flight.get() + 1);
                let (node, answers) = (Rc::clone(node), Rc::clone(answers));
                glommio::spawn_local(async move {
                    let reply = dispatch::produce(&node, version, id, prepared).await;
                    drop(held);
                    answers.in_flight.set(answers.in_flight.get() - 1);
                    node.in_flight.set(node.in_flight.get() - 1);
                    answers.fill(&place, reply);
                })
                .detach();
            }
            other => {
                peer.has_only_come = introduced.is_none_or(|first| first.elapsed() < GREETING);
                let reply = dispatch::handle(node, other, held, peer).await;
                answers.fill(&place, reply);
            }
        }
        if introduces {
            introduced.get_or_insert_with(Instant::now);
        }
    }
    Ok(())
}

async fn send_answers(answers: Rc<Answers>, mut writer: Writer) -> io::Result<()> {
    loop {
        let next = answers
            .changed
            .wait(|| match answers.gather() {
                None => (answers.closed.get() && answers.places.borrow().is_empty()).then_some(None),
                gathered => Some(gathered),
            })
            .await;
        let Some(gathered) = next else {
            writer.close().await;
            return Ok(());
        };
        let len = gathered.len();
        if let Err(error) = gathered.send(&mut writer).await {
            answers.closed.set(true);
            answers.changed.wake_all();
            return Err(error);
        }
        answers.sent(len);
    }
}
