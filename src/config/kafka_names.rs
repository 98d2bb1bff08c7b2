//! Settings of Kafka's brokers (4.4, and 3.9 with ZooKeeper) that are called otherwise here, have no meaning here, or ask for what
//! is not there.

/// What a setting of Kafka is here.
pub(super) enum Meaning {
    /// Another name of settings of ours.
    Same {
        /// Of which.
        of: &'static [&'static str],
        /// Which name counts where several are given: the smallest. 0 is that of our own names.
        rank: u8,
        /// The value of ours; `None` if it says nothing.
        read: fn(&str) -> Result<Option<String>, String>,
    },
    /// Read together with the other ones of listeners.
    OfListeners,
    /// Nothing, as long as it does not ask for what is not there.
    Harmless(fn(&str) -> Result<(), String>),
    /// Nothing; others of the quorum are said with `peers`.
    Quorum,
    /// Nothing.
    None,
}

/// What a setting of Kafka is here; `None` if Kafka has none of this name.
pub(super) fn meaning(name: &str) -> Option<Meaning> {
    let same = |of, rank, read| Some(Meaning::Same { of, rank, read });
    match name {
        "broker.id" => same(&["node.id"], 0, broker_id),
        "log.dirs" => same(&["data.dir"], 0, one_folder),
        "log.dir" => same(&["data.dir"], 1, one_folder),
        "log.retention.minutes" => same(&["log.retention.ms"], 1, |v| time(v, 60_000, true)),
        "log.retention.hours" => same(&["log.retention.ms"], 2, |v| time(v, 3_600_000, true)),
        "log.roll.hours" => same(&["log.roll.ms"], 1, |v| time(v, 3_600_000, false)),
        "log.flush.scheduler.interval.ms" => same(&["log.flush.interval.ms"], 1, as_it_is),
        "log.message.timestamp.difference.max.ms" => same(
            &[
                "log.message.timestamp.before.max.ms",
                "log.message.timestamp.after.max.ms",
            ],
            1,
            as_it_is,
        ),
        "max.decompressed.message.bytes" => same(&["decompress.max.bytes"], 0, as_it_is),
        "listeners" | "advertised.listeners" | "listener.security.protocol.map" | "controller.listener.names" => {
            Some(Meaning::OfListeners)
        }
        "controller.quorum.voters" | "controller.quorum.bootstrap.servers" => Some(Meaning::Quorum),
        "process.roles" => Some(Meaning::Harmless(roles)),
        "security.inter.broker.protocol" => Some(Meaning::Harmless(|v| {
            only(
                v,
                &["PLAINTEXT"],
                "nodes speak QUIC with TLS among themselves: cluster.tls.ca, cluster.tls.cert, cluster.tls.key",
            )
        })),
        "unclean.leader.election.enable" => Some(Meaning::Harmless(|v| {
            only(
                v,
                &["false"],
                "set it on the topics that are to lose records rather than wait",
            )
        })),
        "remote.log.storage.system.enable" => Some(Meaning::Harmless(|v| {
            only(v, &["false"], "tiered storage is not there yet")
        })),
        "authorizer.class.name" => Some(Meaning::Harmless(|v| {
            only(v, &[], "there are no ACLs yet: every client might do everything")
        })),
        "create.topic.policy.class.name" | "alter.config.policy.class.name" | "client.quota.callback.class" => {
            Some(Meaning::Harmless(|v| {
                only(
                    v,
                    &[],
                    "classes of Java cannot be loaded here, so nobody would be held to it",
                )
            }))
        }
        "config.providers" => Some(Meaning::Harmless(|v| {
            only(v, &[], "values are taken as they are written; put the real ones there")
        })),
        "cordoned.log.dirs" => Some(Meaning::Harmless(|v| {
            only(
                v,
                &[],
                "use `millrace cluster drain`, which keeps new replicas away from a node",
            )
        })),
        _ if NOTHING.contains(&name) || FAMILIES.iter().any(|family| name.starts_with(family)) => Some(Meaning::None),
        _ => None,
    }
}

fn as_it_is(value: &str) -> Result<Option<String>, String> {
    Ok(Some(value.into()))
}

/// −1 has ZooKeeper give the broker a number.
fn broker_id(value: &str) -> Result<Option<String>, String> {
    Ok((value.trim() != "-1").then(|| value.into()))
}

fn one_folder(value: &str) -> Result<Option<String>, String> {
    if value.contains(',') {
        return Err("one folder holds all data of a node: name one, or start a node for each disk".into());
    }
    Ok(Some(value.into()))
}

/// A time in `unit` ms. Unlimited if it is negative and may be so.
fn time(value: &str, unit: i64, unlimited: bool) -> Result<Option<String>, String> {
    match value.trim().parse::<i32>() {
        Ok(count) if count < 0 && unlimited => Ok(Some("-1".into())),
        Ok(count) if count > 0 => Ok(Some((i64::from(count) * unit).to_string())),
        _ => Err(format!(
            "expected a whole number from 1 to {}{}",
            i32::MAX,
            if unlimited { ", or -1 for no limit" } else { "" }
        )),
    }
}

fn roles(value: &str) -> Result<(), String> {
    if elements(value).any(|role| role == "broker") {
        Ok(())
    } else {
        Err("every node is a broker here, and the quorum of the metadata is made of those in peers".into())
    }
}

fn only(value: &str, allowed: &[&str], why: &str) -> Result<(), String> {
    let value = value.trim();
    if value.is_empty() || allowed.iter().any(|a| value.eq_ignore_ascii_case(a)) {
        Ok(())
    } else {
        Err(why.into())
    }
}

/// The elements of a list that are not empty.
pub(super) fn elements(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|e| !e.is_empty())
}

/// All names that have a meaning here, for suggestions and lists.
pub(super) const WITH_MEANING: &[&str] = &[
    "advertised.listeners",
    "broker.id",
    "controller.listener.names",
    "listener.security.protocol.map",
    "listeners",
    "log.dir",
    "log.dirs",
    "log.flush.scheduler.interval.ms",
    "log.message.timestamp.difference.max.ms",
    "log.retention.hours",
    "log.retention.minutes",
    "log.roll.hours",
    "max.decompressed.message.bytes",
];

/// Beginnings of names of which none means anything here: TLS and SASL of listeners that are not there, group protocols and
/// transactions that are not there yet, ZooKeeper, threads and buffers of parts that are made otherwise here.
const FAMILIES: &[&str] = &[
    "delegation.token.",
    "errors.deadletterqueue.",
    "group.consumer.",
    "group.coordinator.",
    "group.share.",
    "group.streams.",
    "kafka.metrics.",
    "listener.name.",
    "log.cleaner.",
    "log.local.",
    "log.remote.",
    "metadata.log.",
    "metrics.",
    "password.encoder.",
    "remote.",
    "sasl.",
    "share.",
    "ssl.",
    "transaction.",
    "unstable.",
    "zookeeper.",
];

/// Further names that mean nothing here.
pub(super) const NOTHING: &[&str] = &[
    "add.partitions.to.txn.retry.backoff.max.ms",
    "add.partitions.to.txn.retry.backoff.ms",
    "allow.everyone.if.no.acl.found",
    "alter.log.dirs.replication.quota.window.num",
    "alter.log.dirs.replication.quota.window.size.seconds",
    "auto.include.jmx.reporter",
    "background.threads",
    "broker.heartbeat.interval.ms",
    "broker.id.generation.enable",
    "connection.failed.authentication.delay.ms",
    "connections.max.reauth.ms",
    "control.plane.listener.name",
    "controlled.shutdown.enable",
    "controlled.shutdown.max.retries",
    "controlled.shutdown.retry.backoff.ms",
    "controller.quorum.append.linger.ms",
    "controller.quorum.auto.join.enable",
    "controller.quorum.election.backoff.max.ms",
    "controller.quorum.fetch.max.bytes",
    "controller.quorum.fetch.snapshot.max.bytes",
    "controller.quorum.fetch.timeout.ms",
    "controller.quorum.request.timeout.ms",
    "controller.quorum.retry.backoff.ms",
    "controller.quota.window.num",
    "controller.quota.window.size.seconds",
    "controller.socket.timeout.ms",
    "delete.records.purgatory.purge.interval.requests",
    "early.start.listeners",
    "fetch.purgatory.purge.interval.requests",
    "follower.fetch.last.tiered.offset.enable",
    "initial.broker.registration.timeout.ms",
    "inter.broker.listener.name",
    "inter.broker.protocol.version",
    "leader.imbalance.per.broker.percentage",
    "log.dir.failure.timeout.ms",
    "log.flush.offset.checkpoint.interval.ms",
    "log.flush.start.offset.checkpoint.interval.ms",
    "log.index.interval.bytes",
    "log.index.size.max.bytes",
    "log.initial.task.delay.ms",
    "log.message.downconversion.enable",
    "log.message.format.version",
    "log.preallocate",
    "log.roll.jitter.hours",
    "log.roll.jitter.ms",
    "log.segment.delete.delay.ms",
    "max.connection.creation.rate",
    "max.connections.per.ip",
    "max.connections.per.ip.overrides",
    "max.request.partition.size.limit",
    "metadata.max.idle.interval.ms",
    "metadata.max.retention.bytes",
    "metadata.max.retention.ms",
    "metric.reporters",
    "num.io.threads",
    "num.network.threads",
    "num.recovery.threads.per.data.dir",
    "num.replica.alter.log.dirs.threads",
    "num.replica.fetchers",
    "offsets.commit.required.acks",
    "offsets.commit.timeout.ms",
    "offsets.load.buffer.size",
    "offsets.retention.check.interval.ms",
    "offsets.topic.compression.codec",
    "principal.builder.class",
    "producer.id.expiration.check.interval.ms",
    "producer.purgatory.purge.interval.requests",
    "queued.max.request.bytes",
    "queued.max.requests",
    "quota.window.num",
    "quota.window.size.seconds",
    "replica.fetch.backoff.ms",
    "replica.fetch.max.bytes",
    "replica.fetch.min.bytes",
    "replica.fetch.response.max.bytes",
    "replica.fetch.wait.max.ms",
    "replica.high.watermark.checkpoint.interval.ms",
    "replica.socket.receive.buffer.bytes",
    "replica.socket.timeout.ms",
    "replication.quota.window.num",
    "replication.quota.window.size.seconds",
    "request.timeout.ms",
    "reserved.broker.max.id",
    "security.providers",
    "server.max.startup.time.ms",
    "socket.connection.setup.timeout.max.ms",
    "socket.connection.setup.timeout.ms",
    "socket.listen.backlog.size",
    "socket.receive.buffer.bytes",
    "socket.send.buffer.bytes",
    "super.users",
    "telemetry.max.bytes",
    "transactional.id.expiration.ms",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_meaning_are_listed() {
        for name in WITH_MEANING {
            assert!(
                matches!(meaning(name), Some(Meaning::Same { .. } | Meaning::OfListeners)),
                "{name}"
            );
        }
        for name in NOTHING {
            assert!(matches!(meaning(name), Some(Meaning::None)), "{name}");
            assert!(
                crate::config::find_broker(name).is_none(),
                "{name} is a setting of ours"
            );
        }
    }

    #[test]
    fn times_are_read_in_their_units() {
        for (value, unlimited, ms) in [
            ("168", true, Some("604800000")),
            (" 1 ", true, Some("3600000")),
            ("-1", true, Some("-1")),
            ("-7", true, Some("-1")),
            ("0", true, None),
            ("1.5", true, None),
            ("2147483648", true, None),
            ("2147483647", false, Some("7730941129200000")),
            ("-1", false, None),
        ] {
            let read = time(value, 3_600_000, unlimited).ok().flatten();
            assert_eq!(read.as_deref(), ms, "{value}");
        }
    }
}
