//! The harness must see what a target does to its clients: one that stops for 100 ms now and then must show it in the
//! percentiles, not only in the few requests that were on their way.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::{
    messages::{
        BrokerId, CreateTopicsResponse, DeleteTopicsResponse, FetchResponse, MetadataRequest, MetadataResponse,
        ProduceRequest, ProduceResponse, RequestHeader,
        metadata_response::{MetadataResponsePartition, MetadataResponseTopic},
        produce_response::{PartitionProduceResponse, TopicProduceResponse},
    },
    protocol::{Decodable, Encodable},
};

/// A target that acknowledges everything at once, but for a stop of `stall` once a second.
fn serve(mut stream: TcpStream, stall: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut next_stall = Instant::now() + Duration::from_secs(1);
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut frame)?;
        let mut frame = Bytes::from(frame);
        let header = RequestHeader::decode(&mut frame, 1).expect("a header");
        let version = header.request_api_version;
        let mut out = BytesMut::new();
        out.put_i32(0);
        out.put_i32(header.correlation_id);
        match header.request_api_key {
            0 => {
                let request = ProduceRequest::decode(&mut frame, version).expect("a request");
                let topics = request.topic_data.iter().map(|t| {
                    let partitions = t.partition_data.iter();
                    TopicProduceResponse::default()
                        .with_name(t.name.clone())
                        .with_partition_responses(
                            partitions
                                .map(|p| PartitionProduceResponse::default().with_index(p.index))
                                .collect(),
                        )
                });
                let response = ProduceResponse::default().with_responses(topics.collect());
                response.encode(&mut out, version).expect("encodes");
                if Instant::now() >= next_stall {
                    thread::sleep(stall);
                    next_stall = Instant::now() + Duration::from_secs(1);
                }
            }
            1 => FetchResponse::default().encode(&mut out, version).expect("encodes"),
            3 => {
                let request = MetadataRequest::decode(&mut frame, version).expect("a request");
                let topics = request.topics.unwrap_or_default().into_iter().map(|t| {
                    MetadataResponseTopic::default()
                        .with_name(t.name)
                        .with_partitions(vec![MetadataResponsePartition::default().with_leader_id(BrokerId(0))])
                });
                let response = MetadataResponse::default().with_topics(topics.collect());
                response.encode(&mut out, version).expect("encodes");
            }
            19 => CreateTopicsResponse::default()
                .encode(&mut out, version)
                .expect("encodes"),
            20 => DeleteTopicsResponse::default()
                .encode(&mut out, version)
                .expect("encodes"),
            key => panic!("the harness asked for API {key}"),
        }
        let length = (out.len() - 4) as u32;
        out[..4].copy_from_slice(&length.to_be_bytes());
        stream.write_all(&out)?;
    }
}

#[test]
fn a_target_that_stops_shows_it_in_the_percentiles() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream, Duration::from_millis(100)));
        }
    });
    let dir = std::env::temp_dir().join(format!("millrace-bench-{}", std::process::id()));
    let done = Command::new(env!("CARGO_BIN_EXE_millrace-bench"))
        .args([
            "run",
            "--target",
            &address,
            "--rate",
            "1000",
            "--partitions",
            "1",
            "--warm-up",
            "1",
            "--seconds",
            "4",
        ])
        .arg("--out")
        .arg(&dir)
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    let json = std::fs::read(dir.join("default-target-1.json")).unwrap_or_else(|e| panic!("{e}: {said}"));
    let result: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    let hgrm = std::fs::read_to_string(dir.join("default-target-1-produce.hgrm")).expect("a histogram");
    std::fs::remove_dir_all(&dir).expect("removed");
    let latency = |name: &str| {
        result["produce"][name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {said}"))
            / 1000.0
    };
    // A tenth of the records become due during a stop and wait for what is left of it.
    assert!(latency("max") >= 99.0, "{said}");
    assert!(latency("p99") > 60.0, "{said}");
    assert!(latency("p50") < 40.0, "{said}");
    // Every record of the schedule is accounted for.
    assert_eq!(result["produce"]["count"].as_u64(), Some(4000), "{said}");
    assert!(hgrm.contains("#[Max") && hgrm.lines().count() > 20, "{hgrm}");
}
