//! Answers in pieces over a real connection whose other end reads slowly: they come whole, however much the socket takes at a time.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use bytes::Bytes;
use glommio::{LocalExecutorBuilder, Placement};
use millrace_net::listener::{self, Listener};
use socket2::SockRef;

/// More than the kernel takes at once, of pieces longer and shorter than what it takes, and more of them than are named to it at once.
fn pieces() -> Vec<Bytes> {
    let length = |n: usize| match n % 7 {
        0 => 700_000,
        1 => 1,
        2 => 61,
        _ => 1000 + n,
    };
    (0..150).map(|n| vec![n as u8; length(n)].into()).collect()
}

/// Sends all pieces to `reader` and gives back what the sending came to.
fn serve(reader: impl FnOnce(TcpStream) + Send + 'static) -> std::io::Result<()> {
    let socket = listener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("binds");
    let address = socket.local_addr().expect("bound");
    let reading = std::thread::spawn(move || {
        let stream = TcpStream::connect(address).expect("connects");
        let small = SockRef::from(&stream).set_recv_buffer_size(16 << 10);
        small.expect("a small buffer");
        reader(stream);
    });
    let sent = LocalExecutorBuilder::new(Placement::Unbound)
        .spawn(move || async move {
            let listener = Listener::from(socket);
            let stream = listener.accept().await.expect("a connection");
            let (_reader, mut writer) = listener::split(stream, 1 << 20);
            let sent = writer.send_pieces(VecDeque::from(pieces())).await;
            writer.close().await;
            sent
        })
        .expect("an executor")
        .join()
        .expect("it ends");
    reading.join().expect("the reader found what it expected");
    sent
}

#[test]
fn pieces_come_whole_and_in_order_to_a_slow_reader() {
    serve(|mut stream| {
        let mut got = Vec::new();
        let mut buffer = vec![0; 300_000];
        loop {
            let read = stream.read(&mut buffer).expect("reads");
            if read == 0 {
                break;
            }
            got.extend_from_slice(&buffer[..read]);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(got == pieces().concat(), "{} bytes, not those sent", got.len());
    })
    .expect("all was sent");
}

#[test]
fn a_reader_that_goes_away_is_an_error_and_not_an_end() {
    let error = serve(|mut stream| {
        stream.read_exact(&mut [0; 1000]).expect("the beginning");
    })
    .expect_err("nobody reads the rest");
    assert!(
        matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{error}"
    );
}
