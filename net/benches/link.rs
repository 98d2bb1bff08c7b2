//! QUIC beside plain TCP between two executors: what replication pays for a connection that is encrypted and has streams.
//!
//! `cargo bench -p millrace-net --bench link`. Each round sends frames of one size, so many at most without an answer of 32
//! bytes, over both in turn; both sides' CPU together.

use std::{
    net::SocketAddr,
    sync::mpsc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{
    LocalExecutorBuilder, Placement,
    net::{TcpListener, TcpStream},
};
use millrace_net::quic::{Credentials, Endpoint, bind, tls::node_name};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// Time of one measurement.
const TIME: Duration = Duration::from_secs(2);
/// Bytes of an answer.
const ANSWER: usize = 32;
const ROUNDS: usize = 3;
/// Bytes of a frame, and frames in flight.
const CASES: [(usize, usize); 4] = [(100, 1), (1_000, 1), (1_000, 64), (131_072, 16)];

fn ca() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed")
}

fn credentials(node: i32, ca: &CertifiedIssuer<'static, KeyPair>) -> Credentials {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![node_name(node)]).expect("a name");
    let certificate = params.signed_by(&key, ca).expect("signed");
    Credentials::from_pem(
        ca.pem().as_bytes(),
        certificate.pem().as_bytes(),
        key.serialize_pem().as_bytes(),
    )
    .expect("sound")
}

/// CPU time of this process.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("user") + fields[12].parse::<u64>().expect("system");
    Duration::from_millis(ticks * 10)
}

fn report(
    what: &str,
    size: usize,
    window: usize,
    frames: u64,
    mut waits: Vec<Duration>,
    took: Duration,
    cpu: Duration,
) {
    waits.sort_unstable();
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize].as_micros();
    let bytes = frames as f64 * size as f64;
    println!(
        "{what:5} {size:>7} B x {window:<3} {:>9.0} frames/s {:>8.1} MB/s  p50 {:>6} us  p99 {:>6} us  {:>6.2} CPU us a frame, {:>5.2} CPU s a GB",
        frames as f64 / took.as_secs_f64(),
        bytes / took.as_secs_f64() / 1e6,
        at(0.5),
        at(0.99),
        cpu.as_secs_f64() * 1e6 / frames as f64,
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

fn quic(size: usize, window: usize) {
    let ca = ca();
    let (server, client) = (credentials(1, &ca), credentials(2, &ca));
    pair(
        move |tell| async move {
            let socket = bind(([127, 0, 0, 1], 0).into()).expect("a port");
            tell.send(socket.local_addr().expect("bound")).expect("somebody waits");
            let endpoint = Endpoint::new(socket, &server).expect("sound");
            let connection = endpoint.accept().await.expect("one comes").expect("sound");
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
            let (mut tx, mut rx) = connection.open(1 << 20).await.expect("connected");
            let payload = Bytes::from(vec![1; size]);
            let (begun, before) = (Instant::now(), cpu());
            let (mut sent, mut waits) = (std::collections::VecDeque::new(), Vec::new());
            while begun.elapsed() < TIME {
                while sent.len() < window {
                    sent.push_back(Instant::now());
                    tx.send([vec![payload.clone()]]).await.expect("sent");
                }
                rx.next().await.expect("an answer").expect("an answer");
                waits.push(sent.pop_front().expect("one was sent").elapsed());
            }
            report(
                "QUIC",
                size,
                window,
                waits.len() as u64,
                waits,
                begun.elapsed(),
                cpu() - before,
            );
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
            let mut stream = stream.buffered();
            let frame = [&(size as u32).to_be_bytes()[..], &vec![1; size]].concat();
            let mut answer = [0; ANSWER];
            let (begun, before) = (Instant::now(), cpu());
            let (mut sent, mut waits) = (std::collections::VecDeque::new(), Vec::new());
            while begun.elapsed() < TIME {
                while sent.len() < window {
                    sent.push_back(Instant::now());
                    stream.write_all(&frame).await.expect("sent");
                }
                stream.read_exact(&mut answer).await.expect("an answer");
                waits.push(sent.pop_front().expect("one was sent").elapsed());
            }
            report(
                "TCP",
                size,
                window,
                waits.len() as u64,
                waits,
                begun.elapsed(),
                cpu() - before,
            );
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
