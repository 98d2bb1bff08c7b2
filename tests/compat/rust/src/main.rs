//! The Rust clients against a broker: rdkafka (librdkafka) and rskafka (its own protocol code).

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer},
    producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer},
};
use rskafka::{
    client::{
        ClientBuilder,
        partition::{Compression, OffsetAt, UnknownTopicHandling},
    },
    record::Record,
};

const TOTAL: usize = 3000;

fn with_rdkafka(broker: &str) {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", broker);
    let producer: ThreadedProducer<DefaultProducerContext> = config
        .clone()
        .set("enable.idempotence", "true")
        .create()
        .expect("a producer");
    for n in 0..TOTAL {
        let (key, value) = ((n % 5).to_string(), n.to_string());
        producer
            .send(BaseRecord::to("rdkafka").key(&key).payload(&value))
            .unwrap_or_else(|(e, _)| panic!("{e}"));
    }
    producer.flush(Duration::from_secs(30)).expect("all acknowledged");
    let consumer: BaseConsumer = config
        .set("group.id", "rdkafka")
        .set("auto.offset.reset", "earliest")
        .create()
        .expect("a consumer");
    consumer.subscribe(&["rdkafka"]).expect("subscribed");
    let mut seen = HashSet::new();
    let deadline = Instant::now() + Duration::from_secs(40);
    while seen.len() < TOTAL {
        assert!(Instant::now() < deadline, "only {} in time", seen.len());
        // Nothing is also what a rebalance looks like.
        let Some(message) = consumer.poll(Duration::from_secs(1)) else {
            continue;
        };
        let message = message.expect("a record");
        assert!(seen.insert(message.payload().expect("a value").to_vec()), "twice");
    }
    consumer.commit_consumer_state(CommitMode::Sync).expect("committed");
    let committed: TopicPartitionList = consumer.committed(Duration::from_secs(10)).expect("offsets");
    let sum: i64 = committed
        .elements()
        .iter()
        .filter_map(|e| e.offset().to_raw())
        .filter(|o| *o > 0)
        .sum();
    assert_eq!(sum, TOTAL as i64);
}

async fn with_rskafka(broker: &str) {
    let client = ClientBuilder::new(vec![broker.to_owned()])
        .build()
        .await
        .expect("connected");
    let controller = client.controller_client().expect("a controller");
    controller.create_topic("rskafka", 2, 1, 5_000).await.expect("a topic");
    for partition in 0..2 {
        let log = client
            .partition_client("rskafka", partition, UnknownTopicHandling::Retry)
            .await
            .expect("a partition");
        let records: Vec<Record> = (0..TOTAL)
            .map(|n| Record {
                key: None,
                value: Some(format!("{partition}/{n}").into_bytes()),
                headers: BTreeMap::from([("h".to_owned(), b"x".to_vec())]),
                timestamp: std::time::SystemTime::now().into(),
            })
            .collect();
        for part in records.chunks(500) {
            log.produce(part.to_vec(), Compression::NoCompression)
                .await
                .expect("acknowledged");
        }
        let mut next = 0;
        while next < TOTAL as i64 {
            let (records, high_watermark) = log.fetch_records(next, 1..100_000, 1_000).await.expect("records");
            assert_eq!(high_watermark, TOTAL as i64);
            for r in records {
                assert_eq!(r.offset, next);
                assert_eq!(
                    r.record.value.as_deref(),
                    Some(format!("{partition}/{next}").as_bytes())
                );
                next += 1;
            }
        }
        assert_eq!(log.get_offset(OffsetAt::Latest).await.expect("an offset"), TOTAL as i64);
        log.delete_records(100, 5_000).await.expect("deleted");
        assert_eq!(log.get_offset(OffsetAt::Earliest).await.expect("an offset"), 100);
    }
}

fn main() {
    let broker = std::env::args().nth(1).expect("HOST:PORT");
    with_rdkafka(&broker);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(with_rskafka(&broker));
    println!("all read {TOTAL}");
}
