//! The load itself. Open loop: each producer has a schedule of intended times that waits for no answer; a record's latency
//! counts from its intended time, however late it was sent. As every Kafka client does, a producer has a limit of requests
//! in flight; records that become due meanwhile travel together in the next one.
//!
//! With `rate = 0` the loop is closed and requests are made beforehand, so that the generator costs as little as it can.

use std::{
    collections::VecDeque,
    io::Write,
    net::TcpStream,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use kafka_protocol::{
    messages::{FetchResponse, ProduceResponse, TopicName},
    protocol::Decodable,
};

use crate::{
    Outcome, catch_up,
    wire::{self, Codec, now_ns},
    workload::Workload,
};

/// The generator's own lateness, 99th percentile, above which a run does not count: then it measured itself.
const LAG_MAX_NS: u64 = 2_000_000;
/// Share of the schedule that must have been sent.
const SENT_MIN: f64 = 0.995;
/// How far behind its schedule a target may fall before it is given up.
const BEHIND_MAX: Duration = Duration::from_secs(3);

/// How long a consumer's fetch waits for anything, as clients have it by default.
const FETCH_WAIT_MS: i32 = 500;

/// What a load found out.
pub struct Measured {
    /// Produce latency in nanoseconds, by record.
    pub produce: Histogram<u64>,
    /// From intended sending to receipt by a consumer, in nanoseconds, by record and consumer.
    pub end_to_end: Histogram<u64>,
    /// Records acknowledged in the measured time.
    pub records: u64,
    /// Seconds measured.
    pub seconds: f64,
    /// Megabytes per second that readers of the backlog got together.
    pub catch_up_mb_per_s: Option<f64>,
    /// Why the run does not count, if it does not.
    pub invalid: Option<String>,
    /// The generator's own lateness, 99th percentile, in nanoseconds.
    pub lag_p99: u64,
}

/// A request on its way: the intended times of its records (or when it was sent, and how many).
enum Flight {
    Scheduled(Vec<u64>),
    Counted { sent: u64, records: u64 },
}

#[derive(Default)]
struct InFlight {
    requests: Mutex<VecDeque<Flight>>,
    changed: Condvar,
    failed: AtomicBool,
}

/// When is what.
#[derive(Clone, Copy)]
struct Times {
    begin: u64,
    measure_from: u64,
    end: u64,
}

fn histogram() -> Outcome<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1_000, 600_000_000_000, 3)?)
}

/// Runs a workload on a topic that is there. `on_measure` is called when the warm-up is over, and again at the end.
///
/// # Errors
/// A connection or the broker failed.
pub fn run(address: &str, topic: &str, w: &Workload, mut on_measure: impl FnMut()) -> Outcome<Measured> {
    let mut idle = Vec::with_capacity(w.idle_connections);
    for _ in 0..w.idle_connections {
        idle.push(wire::connect(address)?);
    }
    // As every client does, each producer and consumer has a connection to each broker that leads partitions of it.
    let topic = wire::topic_name(topic);
    let leaders = wire::leaders(address, &topic)?;
    let mut backlog = 0;
    if w.backlog_mb > 0 {
        for (address, led) in &leaders {
            let bytes = w.backlog_mb * 1_000_000 * led.len() as u64 / w.partitions as u64;
            backlog = catch_up::fill(address, &topic, led, bytes)?;
        }
        catch_up::drop_caches();
    }
    let begin = now_ns() + 100_000_000;
    let measure_from = begin + w.warm_up * 1_000_000_000;
    let times = Times {
        begin,
        measure_from,
        end: measure_from + w.seconds * 1_000_000_000,
    };
    // Consumers begin at the end of an empty topic, which is its beginning, and stop when they have seen everything.
    let produced = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let mut consumers = Vec::new();
    for (index, (address, led)) in (0..w.consumers).flat_map(|i| leaders.iter().map(move |l| (i, l))) {
        let partitions: Vec<i32> = led
            .iter()
            .copied()
            .filter(|p| w.fan_out || *p as usize % w.consumers == index)
            .collect();
        if !partitions.is_empty() {
            let (address, topic, done) = (address.clone(), topic.clone(), Arc::clone(&done));
            consumers.push(thread::spawn(move || {
                consume(&address, &topic, &partitions, times, &done)
            }));
        }
    }
    let mut producers = Vec::new();
    for (index, (address, led)) in (0..w.producers).flat_map(|i| leaders.iter().map(move |l| (i, l))) {
        let share = Share {
            index,
            partitions: led.clone(),
        };
        let (w, address, topic) = (w.clone(), address.clone(), topic.clone());
        let produced = Arc::clone(&produced);
        producers.push(thread::spawn(move || {
            produce(&address, &topic, &w, &share, times, &produced)
        }));
    }
    let over = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    for (address, led) in (0..w.backlog_readers).flat_map(|_| &leaders) {
        let (address, topic, led, over) = (address.clone(), topic.clone(), led.clone(), Arc::clone(&over));
        readers.push(thread::spawn(move || {
            catch_up::read(&address, &topic, &led, backlog, times.measure_from, &over)
        }));
    }
    sleep_until(times.measure_from);
    on_measure();
    sleep_until(times.end);
    on_measure();
    over.store(true, Ordering::Release);
    let mut read = Vec::new();
    for reader in readers {
        read.push(reader.join().map_err(|_| "a reader's thread panicked")??);
    }
    let mut measured = Measured {
        produce: histogram()?,
        end_to_end: histogram()?,
        records: 0,
        seconds: w.seconds as f64,
        catch_up_mb_per_s: together(&read),
        invalid: None,
        lag_p99: 0,
    };
    let (mut due, mut sent) = (0, 0);
    for thread in producers {
        let p = thread.join().map_err(|_| "a producer's thread panicked")?;
        let p = p?;
        measured.produce.add(p.latency)?;
        measured.records += p.acknowledged;
        measured.lag_p99 = measured.lag_p99.max(p.lag.value_at_quantile(0.99));
        due += p.due;
        sent += p.sent;
    }
    let wanted = produced.load(Ordering::Acquire) * if w.fan_out { w.consumers as u64 } else { 1 };
    // The consumers' last fetches.
    thread::sleep(Duration::from_millis(if w.consumers > 0 { 700 } else { 0 }));
    done.store(true, Ordering::Release);
    let mut received = 0;
    for thread in consumers {
        let c = thread.join().map_err(|_| "a consumer's thread panicked")?;
        let (latency, records) = c?;
        measured.end_to_end.add(latency)?;
        received += records;
    }
    measured.invalid = if w.rate > 0 && (sent as f64) < due as f64 * SENT_MIN {
        Some(format!("the target did not hold the rate: {sent} of {due} records"))
    } else if w.rate > 0 && measured.lag_p99 > LAG_MAX_NS {
        Some(format!(
            "the generator woke up {:.1} ms late (p99)",
            measured.lag_p99 as f64 / 1e6
        ))
    } else if w.consumers > 0 && received < wanted {
        Some(format!("consumers received {received} of {wanted} records"))
    } else {
        None
    };
    Ok(measured)
}

/// What all readers read, over the time that the last of them took.
fn together(read: &[catch_up::Read]) -> Option<f64> {
    let bytes: u64 = read.iter().map(|r| r.bytes).sum();
    let longest = read.iter().map(|r| r.nanoseconds).max()?;
    Some(bytes as f64 * 1000.0 / longest as f64)
}

fn sleep_until(time: u64) {
    thread::sleep(Duration::from_nanos(time.saturating_sub(now_ns())));
}

/// What one connection of a producer sends.
struct Share {
    /// Which producer.
    index: usize,
    /// Partitions that the broker at the other end leads.
    partitions: Vec<i32>,
}

struct Produced {
    latency: Histogram<u64>,
    lag: Histogram<u64>,
    acknowledged: u64,
    due: u64,
    sent: u64,
}

fn produce(
    address: &str,
    topic: &TopicName,
    w: &Workload,
    share: &Share,
    times: Times,
    produced: &AtomicU64,
) -> Outcome<Produced> {
    let mut sender = wire::connect(address)?;
    let receiver = sender.try_clone()?;
    let flights = Arc::new(InFlight::default());
    let waits_for_answers = w.acks != 0;
    let receive = {
        let flights = Arc::clone(&flights);
        thread::spawn(move || -> Outcome<(Histogram<u64>, u64)> {
            if !waits_for_answers {
                return Ok((histogram()?, 0));
            }
            let result = receive(receiver, &flights, times);
            if result.is_err() {
                flights.failed.store(true, Ordering::Release);
                flights.changed.notify_all();
            }
            result
        })
    };
    // The kernel may otherwise wake a sleeper 50 us late to save wake-ups.
    let _ = std::fs::write("/proc/thread-self/timerslack_ns", "1000");
    let mut lag = histogram()?;
    let sent = if w.rate == 0 {
        saturate(&mut sender, topic, w, share, times, &flights)
    } else {
        keep_schedule(&mut sender, topic, w, share, times, &flights, &mut lag)
    };
    // An empty flight ends the receiver, behind all others.
    flights
        .requests
        .lock()
        .expect("nobody panics holding it")
        .push_back(Flight::Scheduled(Vec::new()));
    flights.changed.notify_all();
    let received = receive.join().map_err(|_| "a receiver's thread panicked")?;
    // The broker's error says more than that sending ended.
    let (latency, acknowledged) = received?;
    let (sent, due) = sent?;
    produced.fetch_add(sent, Ordering::AcqRel);
    Ok(Produced {
        latency,
        lag,
        acknowledged,
        due,
        sent,
    })
}

/// Bytes of a value: noise, or for codecs a pattern of 64 bytes that comes again and again with a little noise.
fn filler(w: &Workload, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out: Vec<u8> = (0..w.record_bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    if w.compression != Codec::None {
        for n in (64..out.len()).filter(|n| n % 7 != 0) {
            out[n] = out[n % 64];
        }
    }
    out
}

/// Which partition the n-th record goes to.
fn partition_of(w: &Workload, n: u64) -> i32 {
    // A fixed fraction of every hundred records, spread by a step that is coprime to it.
    if w.hot_share > 0.0 && (n * 37 % 100) < (w.hot_share * 100.0) as u64 {
        return 0;
    }
    (n % w.partitions as u64) as i32
}

/// Returns records sent and due by the end.
fn keep_schedule(
    sender: &mut TcpStream,
    topic: &TopicName,
    w: &Workload,
    share: &Share,
    times: Times,
    flights: &InFlight,
    lag: &mut Histogram<u64>,
) -> Outcome<(u64, u64)> {
    let step = 1e9 * w.producers as f64 / w.rate as f64;
    let offset = step * share.index as f64 / w.producers as f64;
    let due_at = |n: u64| times.begin + (offset + step * (n - n % w.burst) as f64) as u64;
    let total = ((times.end - times.begin) as f64 / step) as u64;
    let per_batch = (w.batch_bytes / w.record_bytes).max(1);
    let filler = filler(w, share.index as u64 + 1);
    let mut waiting: Vec<Vec<u64>> = vec![Vec::new(); w.partitions as usize];
    // Partitions with something waiting, so that a request costs what it carries and not what the topic has.
    let mut filled: Vec<i32> = Vec::new();
    let mut mine = vec![false; w.partitions as usize];
    share.partitions.iter().for_each(|p| mine[*p as usize] = true);
    // The next record of ours at or behind the n-th of the producer.
    let ours_from = |n: u64| (n..total).find(|n| mine[partition_of(w, *n) as usize]).unwrap_or(total);
    let mut next = ours_from(0);
    let (mut due, mut sent) = (0, 0);
    let give_up = times.end + BEHIND_MAX.as_nanos() as u64;
    loop {
        let first_waiting = filled.iter().map(|p| waiting[*p as usize][0]).min();
        let now = now_ns();
        let wake_at = match first_waiting {
            Some(first) if now >= first + w.linger_us * 1000 => now,
            Some(first) => (first + w.linger_us * 1000).min(due_at(next)),
            None if next == total => break,
            None => due_at(next),
        };
        if wake_at > now {
            // Slept, not spun: a spinning generator takes from a small machine what it wants to measure.
            thread::sleep(Duration::from_nanos(wake_at - now));
            if wake_at >= times.measure_from {
                lag.saturating_record(now_ns().saturating_sub(wake_at).max(1_000));
            }
        }
        let mut take_due = |waiting: &mut Vec<Vec<u64>>, filled: &mut Vec<i32>| {
            let now = now_ns();
            while next < total && due_at(next) <= now {
                let partition = partition_of(w, next);
                let list = &mut waiting[partition as usize];
                if list.is_empty() {
                    filled.push(partition);
                }
                list.push(due_at(next));
                due += 1;
                next = ours_from(next + 1);
            }
        };
        take_due(&mut waiting, &mut filled);
        let lingering = filled
            .iter()
            .all(|p| now_ns() < waiting[*p as usize][0] + w.linger_us * 1000 && waiting[*p as usize].len() < per_batch);
        if filled.is_empty() || lingering {
            continue;
        }
        if now_ns() >= give_up {
            break;
        }
        if !wait_for_slot(flights, w, give_up)? {
            break;
        }
        // What became due while waiting goes along.
        take_due(&mut waiting, &mut filled);
        let mut batches = Vec::with_capacity(filled.len());
        let mut intended = Vec::new();
        for partition in std::mem::take(&mut filled) {
            let list = &mut waiting[partition as usize];
            let rest = list.split_off(list.len().min(per_batch));
            let now = std::mem::replace(list, rest);
            batches.push((partition, wire::batch(&now, w.record_bytes, &filler, w.compression)?));
            intended.extend(now);
            if !waiting[partition as usize].is_empty() {
                filled.push(partition);
            }
        }
        sent += intended.len() as u64;
        let request = wire::produce(topic, w.acks, batches)?;
        send(sender, flights, w, Flight::Scheduled(intended), &request)?;
    }
    // What was not even taken up was due all the same.
    due += (next..total).filter(|n| mine[partition_of(w, *n) as usize]).count() as u64;
    Ok((sent, due))
}

/// Sends full batches as fast as answers come. Returns records sent, twice: nothing is due.
fn saturate(
    sender: &mut TcpStream,
    topic: &TopicName,
    w: &Workload,
    share: &Share,
    times: Times,
    flights: &InFlight,
) -> Outcome<(u64, u64)> {
    let per_batch = (w.batch_bytes / w.record_bytes).max(1);
    let filler = filler(w, share.index as u64 + 1);
    let batch = wire::batch(&vec![0; per_batch], w.record_bytes, &filler, w.compression)?;
    // One partition a request, as a client with full batches sends them one by one or a few together.
    let requests: Vec<Bytes> = share
        .partitions
        .iter()
        .map(|p| wire::produce(topic, w.acks, vec![(*p, batch.clone())]))
        .collect::<Outcome<_>>()?;
    sleep_until(times.begin);
    let mut sent = 0;
    let mut n = share.index;
    while now_ns() < times.end {
        if !wait_for_slot(flights, w, times.end)? {
            break;
        }
        let flight = Flight::Counted {
            sent: now_ns(),
            records: per_batch as u64,
        };
        send(sender, flights, w, flight, &requests[n % requests.len()])?;
        sent += per_batch as u64;
        n += 1;
    }
    Ok((sent, sent))
}

fn wait_for_slot(flights: &InFlight, w: &Workload, give_up: u64) -> Outcome<bool> {
    if w.acks == 0 {
        return Ok(true);
    }
    let mut requests = flights.requests.lock().expect("nobody panics holding it");
    while requests.len() >= w.in_flight {
        if flights.failed.load(Ordering::Acquire) {
            return Err("the connection failed".into());
        }
        let now = now_ns();
        if now >= give_up {
            return Ok(false);
        }
        let wait = Duration::from_nanos(give_up - now);
        requests = flights
            .changed
            .wait_timeout(requests, wait)
            .expect("nobody panics holding it")
            .0;
    }
    Ok(true)
}

fn send(sender: &mut TcpStream, flights: &InFlight, w: &Workload, flight: Flight, request: &[u8]) -> Outcome<()> {
    if w.acks != 0 {
        flights
            .requests
            .lock()
            .expect("nobody panics holding it")
            .push_back(flight);
        flights.changed.notify_all();
    }
    sender.write_all(request)?;
    Ok(())
}

/// Times answers until an empty flight comes. A flight stays in the queue until it is answered.
fn receive(mut stream: TcpStream, flights: &InFlight, times: Times) -> Outcome<(Histogram<u64>, u64)> {
    let mut latency = histogram()?;
    let mut acknowledged = 0;
    let mut buffer = Vec::new();
    loop {
        {
            let mut requests = flights.requests.lock().expect("nobody panics holding it");
            while requests.is_empty() {
                requests = flights.changed.wait(requests).expect("nobody panics holding it");
            }
            if matches!(requests.front(), Some(Flight::Scheduled(times)) if times.is_empty()) {
                return Ok((latency, acknowledged));
            }
        }
        wire::answer(&mut stream, &mut buffer)?;
        let now = now_ns();
        let flight = flights.requests.lock().expect("nobody panics holding it").pop_front();
        flights.changed.notify_all();
        let mut body = Bytes::copy_from_slice(buffer.get(4..).ok_or("an answer is too short")?);
        let response = ProduceResponse::decode(&mut body, wire::PRODUCE)?;
        for partition in response.responses.iter().flat_map(|t| &t.partition_responses) {
            if partition.error_code != 0 {
                return Err(format!(
                    "the broker answered partition {} with error {}",
                    partition.index, partition.error_code
                )
                .into());
            }
        }
        match flight {
            Some(Flight::Scheduled(intended)) => {
                for time in intended.iter().filter(|t| **t >= times.measure_from && **t < times.end) {
                    latency.saturating_record(now.saturating_sub(*time));
                    acknowledged += 1;
                }
            }
            Some(Flight::Counted { sent, records }) => {
                if now >= times.measure_from && now < times.end {
                    latency.saturating_record(now - sent);
                    acknowledged += records;
                }
            }
            None => return Err("an answer came that nothing was sent for".into()),
        }
    }
}

/// Reads everything of some partitions until told that there is no more. Returns latency and the records received.
fn consume(
    address: &str,
    topic: &TopicName,
    partitions: &[i32],
    times: Times,
    done: &AtomicBool,
) -> Outcome<(Histogram<u64>, u64)> {
    let mut stream = wire::connect(address)?;
    let mut latency = histogram()?;
    let mut offsets: Vec<(i32, i64)> = partitions.iter().map(|p| (*p, 0)).collect();
    let mut received = 0;
    let mut buffer = Vec::new();
    loop {
        let last = done.load(Ordering::Acquire);
        let request = wire::fetch(topic, &offsets, FETCH_WAIT_MS)?;
        stream.write_all(&request)?;
        wire::answer(&mut stream, &mut buffer)?;
        let now = now_ns();
        let mut body = Bytes::copy_from_slice(buffer.get(4..).ok_or("an answer is too short")?);
        let response = FetchResponse::decode(&mut body, wire::FETCH)?;
        let before = received;
        for partition in response.responses.iter().flat_map(|t| &t.partitions) {
            if partition.error_code != 0 {
                return Err(format!(
                    "the broker answered a fetch of partition {} with error {}",
                    partition.partition_index, partition.error_code
                )
                .into());
            }
            let Some(records) = &partition.records else { continue };
            let next = wire::for_each_time(records, |time| {
                received += 1;
                if time >= times.measure_from && time < times.end {
                    latency.saturating_record(now.saturating_sub(time));
                }
            });
            if let Some(next) = next
                && let Some(offset) = offsets.iter_mut().find(|(p, _)| *p == partition.partition_index)
            {
                offset.1 = next;
            }
        }
        if last && received == before {
            return Ok((latency, received));
        }
    }
}
