//! QUIC beside plain TCP between two executors: what replication pays for a connection that is encrypted and has streams.
//!
//! `cargo bench -p millrace-net --bench link`. Each round sends frames of one size, so many at most without an answer of 32
//! bytes, over both in turn; both sides' CPU together.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::mpsc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{
    LocalExecutorBuilder, Placement,
    net::{Preallocated, TcpListener, TcpStream},
};
use millrace_net::quic::{Endpoint, FrameReceiver, FrameSender, bind};

#[path = "../tests/authority/mod.rs"]
mod authority;

use authority::{ca, credentials};

/// Time of one measurement.
const TIME: Duration = Duration::from_secs(2);
/// Bytes of an answer.
const ANSWER: usize = 32;
const ROUNDS: usize = 3;
/// Bytes of a frame, and frames in flight.
const CASES: [(usize, usize); 4] = [(100, 1), (1_000, 1), (1_000, 64), (131_072, 16)];

/// CPU time of this process.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("user") + fields[12].parse::<u64>().expect("system");
    Duration::from_millis(ticks * 10)
}

/// The client's side of a connection.
trait Link {
    async fn send(&mut self);
    async fn receive(&mut self);
}

/// Keeps `window` frames without an answer for a while, and tells what came of it.
async fn drive(what: &str, size: usize, window: usize, link: &mut impl Link) {
    let (begun, before) = (Instant::now(), cpu());
    let (mut sent, mut waits) = (VecDeque::new(), Vec::new());
    while begun.elapsed() < TIME {
        while sent.len() < window {
            sent.push_back(Instant::now());
            link.send().await;
        }
        link.receive().await;
        waits.push(sent.pop_front().expect("one was sent").elapsed());
    }
    let (took, cpu) = (begun.elapsed(), cpu() - before);
    waits.sort_unstable();
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize].as_micros();
    let frames = waits.len() as f64;
    let bytes = frames * size as f64;
    println!(
        "{what:5} {size:>7} B x {window:<3} {:>9.0} frames/s {:>8.1} MB/s  p50 {:>6} us  p99 {:>6} us  {:>6.2} CPU us a frame, {:>5.2} CPU s a GB",
        frames / took.as_secs_f64(),
        bytes / took.as_secs_f64() / 1e6,
        at(0.5),
        at(0.99),
        cpu.as_secs_f64() * 1e6 / frames,
        cpu.as_secs_f64() / bytes * 1e9,
    );
}

/// Runs `server` on one core and `client` on the other.
fn pair<S: Future<Output = ()> + 'static, C: Future<Output = ()> + 'static>(
    server: impl FnOnce(mpsc::Sender<SocketAddr>) -> S + Send + 'static,
    client: impl FnOnce(SocketAddr) -> C + Send + 'static,
) {
    let (tell, told) = mpsc::channel();
    let thread = LocalExecutorBuilder::new(Placement::Fixed(0))
        .spawn(move || async move { server(tell).await })
        .expect("an executor");
    let address = told.recv().expect("it listens");
    LocalExecutorBuilder::new(Placement::Fixed(1))
        .spawn(move || async move { client(address).await })
        .expect("an executor")
        .join()
        .expect("the client");
    thread.join().expect("the server");
}

struct Quic {
    tx: FrameSender,
    rx: FrameReceiver,
    payload: Bytes,
}

impl Link for Quic {
    async fn send(&mut self) {
        self.tx.send([vec![self.payload.clone()]]).await.expect("sent");
    }

    async fn receive(&mut self) {
        self.rx.next().await.expect("an answer").expect("an answer");
    }
}

struct Tcp {
    stream: TcpStream<Preallocated>,
    frame: Vec<u8>,
}

impl Link for Tcp {
    async fn send(&mut self) {
        self.stream.write_all(&self.frame).await.expect("sent");
    }

    async fn receive(&mut self) {
        self.stream.read_exact(&mut [0; ANSWER]).await.expect("an answer");
    }
}

fn quic(size: usize, window: usize) {
    let ca = ca();
    let (server, client) = (credentials(1, &ca, &ca), credentials(2, &ca, &ca));
    pair(
        move |tell| async move {
            let socket = bind(([127, 0, 0, 1], 0).into()).expect("a port");
            tell.send(socket.local_addr().expect("bound")).expect("somebody waits");
            let endpoint = Endpoint::new(socket, &server).expect("sound");
            let connection = endpoint
                .accept()
                .await
                .expect("one comes")
                .finish()
                .await
                .expect("sound");
            let (mut tx, mut rx) = connection.accept(1 << 20).await.expect("a stream");
            while let Ok(Some(_)) = rx.next().await {
                if tx.send([vec![Bytes::from_static(&[7; ANSWER])]]).await.is_err() {
                    break;
                }
            }
        },
        move |address| async move {
            let endpoint = Endpoint::new(bind(([127, 0, 0, 1], 0).into()).expect("a port"), &client).expect("sound");
            let connection = endpoint.connect(address, 1).await.expect("it listens");
            let (tx, rx) = connection.open(1 << 20).await.expect("connected");
            let payload = Bytes::from(vec![1; size]);
            drive("QUIC", size, window, &mut Quic { tx, rx, payload }).await;
            connection.close("done");
            endpoint.close().await;
        },
    );
}

fn tcp(size: usize, window: usize) {
    pair(
        move |tell| async move {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            tell.send(listener.local_addr().expect("bound"))
                .expect("somebody waits");
            let mut stream = listener.accept().await.expect("one comes");
            let mut buffer = vec![0; 256 << 10];
            let mut have = 0;
            while let Ok(more @ 1..) = stream.read(&mut buffer).await {
                have += more;
                let frames = have / (size + 4);
                have %= size + 4;
                if frames > 0 && stream.write_all(&[7; ANSWER].repeat(frames)).await.is_err() {
                    break;
                }
            }
        },
        move |address| async move {
            let stream = TcpStream::connect(address).await.expect("it listens");
            stream.set_nodelay(true).expect("a socket");
            let frame = [&(size as u32).to_be_bytes()[..], &vec![1; size]].concat();
            let stream = stream.buffered();
            drive("TCP", size, window, &mut Tcp { stream, frame }).await;
        },
    );
}

fn main() {
    for (size, window) in CASES {
        for _ in 0..ROUNDS {
            quic(size, window);
            tcp(size, window);
        }
    }
}
