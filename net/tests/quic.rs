//! QUIC between two executors of this process: frames, certificates, garbage.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use glommio::{LocalExecutorBuilder, Placement, timer::sleep};
use millrace_net::quic::{Credentials, Endpoint, LinkError, bind};

mod authority;

use authority::{ca, credentials};

/// Runs a server that echoes frames, as node 1, and `client` beside it.
fn with_echo<F: Future<Output = ()> + 'static>(
    server: Credentials,
    client: impl FnOnce(SocketAddr) -> F + Send + 'static,
) {
    let socket = bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let address = socket.local_addr().expect("bound");
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = LocalExecutorBuilder::new(Placement::Unbound)
        .spawn(move || async move {
            let endpoint = Endpoint::new(socket, &server).expect("sound");
            let serve = async {
                while let Some(handshake) = endpoint.accept().await {
                    glommio::spawn_local(async move {
                        let Ok(connection) = handshake.finish().await else {
                            return;
                        };
                        while let Ok((mut tx, mut rx)) = connection.accept(1 << 20).await {
                            glommio::spawn_local(async move {
                                while let Ok(Some(frame)) = rx.next().await {
                                    tx.send([vec![frame]]).await.expect("the client listens");
                                }
                            })
                            .detach();
                        }
                    })
                    .detach();
                }
            };
            let until = async {
                while stopped.try_recv().is_err() {
                    sleep(Duration::from_millis(10)).await;
                }
            };
            futures_lite::future::or(serve, until).await;
        })
        .expect("an executor");
    LocalExecutorBuilder::new(Placement::Unbound)
        .spawn(move || async move { client(address).await })
        .expect("an executor")
        .join()
        .expect("the client");
    stop.send(()).expect("the server runs");
    thread.join().expect("the server");
}

fn endpoint(credentials: &Credentials) -> Endpoint {
    let socket = bind(([127, 0, 0, 1], 0).into()).expect("a port");
    Endpoint::new(socket, credentials).expect("sound")
}

#[test]
fn frames_come_whole_and_in_order() {
    let ca = ca();
    let (server, client) = (credentials(1, &ca, &ca), credentials(2, &ca, &ca));
    with_echo(server, move |address| async move {
        let endpoint = endpoint(&client);
        let connection = endpoint.connect(address, 1).await.expect("it listens");
        assert!(connection.is_node(1) && !connection.is_node(2) && !connection.is_node(11));
        let (mut tx, mut rx) = connection.open(1 << 20).await.expect("connected");
        let frames: Vec<Bytes> = (0..300_usize).map(|n| vec![n as u8; n * n % 90_000].into()).collect();
        let sending = frames.clone();
        glommio::spawn_local(async move {
            for frame in sending {
                // In parts, some of them empty.
                let (a, b) = (frame.slice(..frame.len() / 3), frame.slice(frame.len() / 3..));
                tx.send([vec![a, Bytes::new(), b]]).await.expect("connected");
            }
            tx.finish();
            sleep(Duration::from_secs(1)).await;
        })
        .detach();
        for frame in frames {
            assert_eq!(rx.next().await.expect("connected"), Some(frame));
        }
    });
}

#[test]
fn who_is_not_of_the_cluster_or_not_who_was_meant_is_refused() {
    let (ours, theirs) = (ca(), ca());
    let server = credentials(1, &ours, &ours);
    let (good, foreign, gullible) = (
        credentials(2, &ours, &ours),
        credentials(2, &theirs, &theirs),
        credentials(2, &theirs, &ours),
    );
    with_echo(server, move |address| async move {
        let refused = |result: Result<_, LinkError>| result.err().map(|e| e.to_string());
        let error = refused(endpoint(&good).connect(address, 3).await).expect("it is node 1");
        assert!(error.contains("not valid for name"), "{error}");
        refused(endpoint(&foreign).connect(address, 1).await).expect("another CA");
        // A client that believes the server, with a certificate that the server does not believe.
        let connection = endpoint(&gullible).connect(address, 1).await;
        let lost = match connection {
            Err(_) => true,
            Ok(connection) => connection.accept(10).await.is_err(),
        };
        assert!(lost);
    });
}

#[test]
fn nobody_waits_for_a_handshake_that_does_not_end() {
    let ca = ca();
    let (server, client) = (credentials(1, &ca, &ca), credentials(2, &ca, &ca));
    with_echo(server, move |address| async move {
        // More than an address may begin that never gets our answers: each sends its first datagram, and hears nothing.
        let mut deaf = Vec::new();
        for _ in 0..200 {
            let between = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
            between.set_nonblocking(true).expect("a socket");
            let endpoint = endpoint(&client);
            let port = between.local_addr().expect("bound");
            let trying = glommio::spawn_local(async move {
                _ = endpoint.connect(port, 1).await;
            });
            let mut datagram = [0; 2_000];
            let size = loop {
                match between.recv(&mut datagram) {
                    Ok(size) => break size,
                    Err(_) => sleep(Duration::from_millis(1)).await,
                }
            };
            between.send_to(&datagram[..size], address).expect("sent");
            deaf.push((between, trying));
        }
        let connection = endpoint(&client).connect(address, 1).await.expect("it listens");
        let (mut tx, mut rx) = connection.open(1_000).await.expect("connected");
        tx.send([vec![Bytes::from_static(b"here")]]).await.expect("connected");
        assert_eq!(rx.next().await.expect("connected"), Some(Bytes::from_static(b"here")));
        for (_, trying) in deaf {
            trying.cancel().await;
        }
    });
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let ca = ca();
    let (server, client) = (credentials(1, &ca, &ca), credentials(2, &ca, &ca));
    with_echo(server, move |address| async move {
        let endpoint = endpoint(&client);
        let connection = endpoint.connect(address, 1).await.expect("it listens");
        let (mut tx, mut rx) = connection.open(1 << 20).await.expect("connected");
        let noise = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        for n in 0..200_usize {
            let datagram: Vec<u8> = (0..n * 7 % 1_400).map(|i| (i * n) as u8).collect();
            noise.send_to(&datagram, address).expect("sent");
            noise.send_to(&[], address).expect("sent");
            if n % 20 == 0 {
                let frame = Bytes::from(vec![n as u8; 5_000]);
                tx.send([vec![frame.clone()]]).await.expect("connected");
                assert_eq!(rx.next().await.expect("connected"), Some(frame));
            }
        }
    });
}

#[test]
fn a_frame_over_the_limit_is_refused_before_it_is_read() {
    let ca = ca();
    let (server, client) = (credentials(1, &ca, &ca), credentials(2, &ca, &ca));
    with_echo(server, move |address| async move {
        let endpoint = endpoint(&client);
        let connection = endpoint.connect(address, 1).await.expect("it listens");
        let (mut tx, mut rx) = connection.open(1_000).await.expect("connected");
        tx.send([vec![Bytes::from(vec![1; 1_001])]]).await.expect("connected");
        let error = rx.next().await.expect_err("too long").to_string();
        assert!(error.contains("1001 bytes"), "{error}");
    });
}
