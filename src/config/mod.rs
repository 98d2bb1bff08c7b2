//! The configuration registry: one table behind the command line, environment, TOML file, documentation and
//! DescribeConfigs.
//!
//! Names are Kafka's where Kafka has one. A broker setting `num.partitions` is given as `--set num.partitions=8`, as
//! `MILLRACE_NUM_PARTITIONS=8`, or as `num.partitions = 8` in the file; the command line wins over the environment, the
//! environment over the file. Kafka's other settings are read, too: some say the same in another way, most mean nothing here.

mod entries;
mod kafka_names;
mod known;
mod listeners;
mod properties;

use std::{collections::BTreeMap, path::Path};

use thiserror::Error;

pub use entries::{ENTRIES, Entry, Kind, Scope, find_broker, find_topic};
use kafka_names::{Meaning, meaning};
pub use known::Known;

/// A configuration that cannot be used; the text says what to do.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not in the registry.
    #[error("unknown setting {name:?}{}; `millrace settings` lists all", hint.as_ref().map(|h| format!(" (did you mean {h:?}?)")).unwrap_or_default())]
    Unknown {
        /// As given.
        name: String,
        /// A name like it.
        hint: Option<String>,
    },
    /// Outside its type or bounds.
    #[error("{reason}")]
    Invalid {
        /// Which and why.
        reason: String,
    },
    /// The file cannot be read or is not TOML.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
}

/// Where a value came from; DescribeConfigs says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The registry.
    Default,
    /// File, environment or command line.
    Static,
}

/// Where settings are given; later ones win.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Layer {
    File,
    Environment,
    CommandLine,
}

/// Broker settings in force.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    set: BTreeMap<&'static str, (Layer, String)>,
    /// Those of Kafka's that we call otherwise or do not have, as given.
    of_kafka: BTreeMap<String, (Layer, String)>,
    /// Those of them that mean nothing here.
    unused: Vec<String>,
    /// Defaults that depend on the host.
    adapted: BTreeMap<&'static str, String>,
}

/// One of several ways in which a setting of ours is given.
struct Candidate<'a> {
    layer: Layer,
    /// The smallest counts.
    rank: u8,
    /// As given.
    name: &'a str,
    /// Of our setting.
    value: String,
}

impl Settings {
    /// Sets one, as the command line does.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        self.put(Layer::CommandLine, name, value)
    }

    fn put(&mut self, layer: Layer, name: &str, value: &str) -> Result<(), ConfigError> {
        if let Some(entry) = find_broker(name) {
            let value = entry.read(value).map_err(|reason| ConfigError::Invalid { reason })?;
            self.set.insert(entry.name, (layer, value));
        } else if meaning(name).is_some() {
            self.of_kafka.insert(name.into(), (layer, value.trim().into()));
        } else {
            return Err(ConfigError::Unknown {
                name: name.into(),
                hint: closest(name),
            });
        }
        Ok(())
    }

    /// Takes up what Kafka's names say, once all are given.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`]: a value that asks for what is not there, or two that contradict each other.
    pub fn finish(&mut self) -> Result<(), ConfigError> {
        let of_kafka = std::mem::take(&mut self.of_kafka);
        let invalid = |reason: String| ConfigError::Invalid { reason };
        let of_name = |name: &str, value: &str, why: String| invalid(format!("{name}={value} cannot be done: {why}"));
        let mut candidates: BTreeMap<&'static str, Vec<Candidate<'_>>> = BTreeMap::new();
        for (name, (layer, value)) in &of_kafka {
            let refused = |why: String| of_name(name, value, why);
            match meaning(name) {
                Some(Meaning::Same { of, rank, read }) => {
                    let Some(read) = read(value).map_err(refused)? else {
                        continue;
                    };
                    for to in of {
                        candidates.entry(to).or_default().push(Candidate {
                            layer: *layer,
                            rank,
                            name,
                            value: read.clone(),
                        });
                    }
                }
                Some(Meaning::Harmless(check)) => {
                    check(value).map_err(refused)?;
                    self.unused.push(name.clone());
                }
                Some(Meaning::Quorum) => {
                    if value.contains(',') && self.get("peers").is_empty() {
                        return Err(refused(
                            "say with peers which nodes the cluster begins with, as ID@HOST:PORT of their cluster.listen; \
                             without, this node would be a cluster of its own"
                                .into(),
                        ));
                    }
                    self.unused.push(name.clone());
                }
                Some(Meaning::None) => self.unused.push(name.clone()),
                Some(Meaning::OfListeners) | None => {}
            }
        }
        let text = |name: &str| {
            of_kafka
                .get(name)
                .map(|(_, value)| value.as_str())
                .filter(|v| !v.is_empty())
        };
        let addresses = listeners::read(&listeners::Given {
            listeners: text("listeners"),
            advertised: text("advertised.listeners"),
            protocols: text("listener.security.protocol.map"),
            of_controllers: text("controller.listener.names"),
        })
        .map_err(invalid)?;
        for (to, name, address) in [
            ("kafka.listen", "listeners", addresses.listen),
            ("advertise", "advertised.listeners", addresses.advertise),
        ] {
            if let Some(value) = address {
                let layer = of_kafka.get(name).map_or(Layer::File, |(layer, _)| *layer);
                // Where one follows from the other, it gives way to whatever says it.
                let rank = u8::from(!of_kafka.contains_key(name));
                candidates.entry(to).or_default().push(Candidate {
                    layer,
                    rank,
                    name,
                    value,
                });
            }
        }
        for (to, ways) in candidates {
            self.decide(to, ways)?;
        }
        Ok(())
    }

    /// Has the strongest of several ways to give a setting count.
    fn decide(&mut self, to: &'static str, mut ways: Vec<Candidate<'_>>) -> Result<(), ConfigError> {
        let entry = find_broker(to).unwrap_or_else(|| panic!("no setting {to}"));
        for way in &mut ways {
            way.value = entry.read(&way.value).map_err(|reason| ConfigError::Invalid {
                reason: format!("{}: {reason}", way.name),
            })?;
        }
        if let Some((layer, value)) = self.set.remove(to) {
            ways.push(Candidate {
                layer,
                rank: 0,
                name: to,
                value,
            });
        }
        let strength = |way: &Candidate<'_>| (way.layer, std::cmp::Reverse(way.rank));
        ways.sort_by_key(strength);
        let Some(strongest) = ways.pop() else {
            return Ok(());
        };
        if let Some(other) = ways.last()
            && strength(other) == strength(&strongest)
            && other.value != strongest.value
        {
            return Err(ConfigError::Invalid {
                reason: format!(
                    "{} ({}) and {} ({}) say the same setting otherwise: leave one of them",
                    other.name, other.value, strongest.name, strongest.value
                ),
            });
        }
        self.set.insert(to, (strongest.layer, strongest.value));
        Ok(())
    }

    /// Settings of Kafka's that were given and mean nothing here.
    #[must_use]
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Gives a setting another default on this host.
    ///
    /// # Panics
    /// If the registry has no such broker setting: a bug of ours.
    pub fn adapt(&mut self, name: &str, value: String) {
        let entry = find_broker(name).unwrap_or_else(|| panic!("no setting {name}"));
        self.adapted.insert(entry.name, value);
    }

    /// Takes in a TOML file, where tables are read as dotted names, or one of Java properties if it is called `….properties`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let file = |reason: String| ConfigError::File {
            path: path.display().to_string(),
            reason,
        };
        let text = std::fs::read_to_string(path).map_err(|e| file(e.to_string()))?;
        let flat = if path.extension().is_some_and(|e| e == "properties") {
            properties::read(&text)
        } else {
            let table: toml::Table = text.parse().map_err(|e: toml::de::Error| file(e.to_string()))?;
            let mut flat = Vec::new();
            flatten("", &table, &mut flat);
            flat
        };
        for (name, value) in flat {
            self.put(Layer::File, &name, &value)?;
        }
        Ok(())
    }

    /// Takes in `MILLRACE_…` variables. Ones that name no setting are refused, like any other misspelling; those that Kubernetes
    /// gives every pod beside a Service named `millrace` are passed over.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load_environment(&mut self, variables: impl Iterator<Item = (String, String)>) -> Result<(), ConfigError> {
        for (variable, value) in variables {
            let Some(rest) = variable.strip_prefix("MILLRACE_") else {
                continue;
            };
            // Of the command itself.
            if rest == "LOG" || rest == "CONFIG" || rest.starts_with("TEST_") || is_of_a_service(rest) {
                continue;
            }
            self.put(Layer::Environment, &rest.to_ascii_lowercase().replace('_', "."), &value)?;
        }
        Ok(())
    }

    /// Value of a setting.
    ///
    /// # Panics
    /// If the registry has no such broker setting: a bug of ours.
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        (self.set.get(name)).map_or_else(|| self.default_of(name), |(_, value)| value)
    }

    /// Its value if nobody says another.
    ///
    /// # Panics
    /// If the registry has no such broker setting: a bug of ours.
    #[must_use]
    pub fn default_of(&self, name: &str) -> &str {
        let of_registry = || find_broker(name).unwrap_or_else(|| panic!("no setting {name}")).default;
        (self.adapted.get(name)).map_or_else(of_registry, String::as_str)
    }

    /// Where it comes from.
    #[must_use]
    pub fn source(&self, name: &str) -> Source {
        if self.set.contains_key(name) {
            Source::Static
        } else {
            Source::Default
        }
    }

    /// A numeric setting.
    ///
    /// # Panics
    /// If it is not numeric: values are checked when set.
    #[must_use]
    pub fn number(&self, name: &str) -> i64 {
        self.get(name)
            .parse()
            .unwrap_or_else(|_| panic!("{name} was checked when set"))
    }

    /// A yes-or-no setting.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        self.get(name) == "true"
    }

    /// The default that a topic setting has on this broker, and where it comes from.
    #[must_use]
    pub fn topic_default(&self, entry: &Entry) -> (&str, Source) {
        match entry.scope {
            Scope::Topic { broker } if !broker.is_empty() => (self.get(broker), self.source(broker)),
            _ => (find_topic(entry.name).map_or("", |e| e.default), Source::Default),
        }
    }
}

/// Whether Kubernetes makes a variable of this name, behind the prefix, for a Service named like this program: `SERVICE_HOST`,
/// `SERVICE_PORT`, `SERVICE_PORT_NAME`, `PORT`, `PORT_9092_TCP`, `PORT_9092_TCP_ADDR` (kubernetes.io, "Environment variables" of
/// Services).
fn is_of_a_service(rest: &str) -> bool {
    if matches!(rest, "SERVICE_HOST" | "SERVICE_PORT" | "PORT") || rest.starts_with("SERVICE_PORT_") {
        return true;
    }
    let mut parts = rest.split('_');
    parts.next() == Some("PORT")
        && parts.next().is_some_and(|p| p.parse::<u16>().is_ok())
        && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
        && matches!(parts.next(), None | Some("PROTO" | "PORT" | "ADDR"))
        && parts.next().is_none()
}

fn flatten(prefix: &str, table: &toml::Table, out: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let name = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            toml::Value::Table(inner) => flatten(&name, inner, out),
            toml::Value::String(s) => out.push((name, s.clone())),
            other => out.push((name, other.to_string())),
        }
    }
}

/// Kafka's names for settings that have another one here, a line each.
#[must_use]
pub fn names_of_kafka() -> String {
    let line = |name: &&str| match meaning(name) {
        Some(Meaning::Same { of, .. }) => format!("{name}: {}\n", of.join(", ")),
        _ => format!("{name}: kafka.listen, advertise\n"),
    };
    kafka_names::WITH_MEANING.iter().map(line).collect()
}

/// The name that was meant, if one is like it.
fn closest(name: &str) -> Option<String> {
    if let Some(Entry {
        scope: Scope::Topic { broker },
        ..
    }) = find_topic(name)
        && !broker.is_empty()
    {
        return Some((*broker).to_owned());
    }
    let bare = |name: &str| name.replace(['.', '_', '-'], "").to_ascii_lowercase();
    let ours = ENTRIES
        .iter()
        .filter(|e| matches!(e.scope, Scope::Broker { .. }))
        .map(|e| e.name);
    ours.chain(kafka_names::WITH_MEANING.iter().copied())
        .chain(kafka_names::NOTHING.iter().copied())
        .map(|known| (edits(&bare(known), &bare(name)), known))
        .min()
        .filter(|(edits, known)| *edits <= known.len().min(name.len()) / 5)
        .map(|(_, known)| known.to_owned())
}

/// How many letters have to be put in, taken out or exchanged to get from one word to another (Levenshtein).
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let exchanged = corner + usize::from(a != *b);
            corner = row[j + 1];
            row[j + 1] = exchanged.min(corner + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

/// Bytes of a size like `64MiB`, `1G`, `1048576`.
///
/// # Errors
/// A text that says what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let scale = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1_u64 << 40,
        _ => return Err(format!("{text:?} is not a size; write for example 512MiB or 2GiB")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(scale))
        .ok_or_else(|| format!("{text:?} is not a size; write for example 512MiB or 2GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_file_environment_and_command_line() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let file = dir.path().join("millrace.toml");
        std::fs::write(
            &file,
            "num.partitions = 3\n[group]\nmax.size = 7\n[log]\nretention.ms = 5\n",
        )
        .expect("written");
        let mut settings = Settings::default();
        settings.load_file(&file).expect("valid");
        settings
            .load_environment(
                [
                    ("MILLRACE_NUM_PARTITIONS".into(), "4".into()),
                    ("PATH".into(), "x".into()),
                ]
                .into_iter(),
            )
            .expect("valid");
        assert_eq!(settings.number("num.partitions"), 4);
        settings.set("num.partitions", "5").expect("valid");
        assert_eq!(settings.number("num.partitions"), 5);
        assert_eq!(settings.number("group.max.size"), 7);
        assert_eq!(settings.source("log.retention.ms"), Source::Static);
        assert!(matches!(
            settings.set("num.partitons", "1"),
            Err(ConfigError::Unknown { .. })
        ));
        assert!(matches!(
            settings.set("num.partitions", "0"),
            Err(ConfigError::Invalid { .. })
        ));
    }

    fn of(layers: [&[(&str, &str)]; 3]) -> Result<Settings, ConfigError> {
        let mut settings = Settings::default();
        for (layer, given) in [Layer::File, Layer::Environment, Layer::CommandLine]
            .into_iter()
            .zip(layers)
        {
            for (name, value) in given {
                settings.put(layer, name, value)?;
            }
        }
        settings.finish().map(|()| settings)
    }

    #[test]
    fn kafkas_names_count_as_in_kafka() {
        for (layers, name, value) in [
            // Finer units first, in any order.
            (
                [&[("log.retention.hours", "2")], &[], &[]] as [&[(&str, &str)]; 3],
                "log.retention.ms",
                "7200000",
            ),
            (
                [
                    &[("log.retention.minutes", "5"), ("log.retention.hours", "2")],
                    &[],
                    &[],
                ],
                "log.retention.ms",
                "300000",
            ),
            (
                [&[("log.retention.ms", "7"), ("log.retention.hours", "2")], &[], &[]],
                "log.retention.ms",
                "7",
            ),
            ([&[("log.retention.hours", "-1")], &[], &[]], "log.retention.ms", "-1"),
            ([&[("log.roll.hours", "1")], &[], &[]], "log.roll.ms", "3600000"),
            ([&[("log.dirs", "/a"), ("log.dir", "/b")], &[], &[]], "data.dir", "/a"),
            ([&[("log.dir", "/b")], &[], &[]], "data.dir", "/b"),
            ([&[("broker.id", "3"), ("node.id", "3")], &[], &[]], "node.id", "3"),
            ([&[("broker.id", "-1")], &[], &[]], "node.id", "0"),
            (
                [&[("log.message.timestamp.difference.max.ms", "9")], &[], &[]],
                "log.message.timestamp.after.max.ms",
                "9",
            ),
            (
                [&[("advertised.listeners", "PLAINTEXT://b:9")], &[], &[]],
                "kafka.listen",
                "0.0.0.0:9092",
            ),
            (
                [
                    &[("advertised.listeners", "PLAINTEXT://b:9")],
                    &[],
                    &[("kafka.listen", "1.2.3.4:9")],
                ],
                "kafka.listen",
                "1.2.3.4:9",
            ),
            (
                [
                    &[
                        ("advertised.listeners", "PLAINTEXT://b:9"),
                        ("kafka.listen", "1.2.3.4:9"),
                    ],
                    &[],
                    &[],
                ],
                "advertise",
                "b:9",
            ),
            // The command line before the environment, that before the file.
            (
                [&[("log.retention.ms", "7")], &[("log.retention.hours", "1")], &[]],
                "log.retention.ms",
                "3600000",
            ),
            (
                [&[("log.dirs", "/a")], &[("log.dir", "/b")], &[("data.dir", "/c")]],
                "data.dir",
                "/c",
            ),
            (
                [&[("listeners", "PLAINTEXT://:1")], &[], &[("kafka.listen", "h:2")]],
                "kafka.listen",
                "h:2",
            ),
        ] {
            let settings = of(layers).unwrap_or_else(|e| panic!("{layers:?}: {e}"));
            assert_eq!(settings.get(name), value, "{layers:?}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for (given, why) in [
            (&[("broker.id", "1"), ("node.id", "2")] as &[(&str, &str)], "leave one"),
            (&[("log.dirs", "/a"), ("data.dir", "/b")], "leave one"),
            (&[("listeners", "PLAINTEXT://:1"), ("kafka.listen", "h:2")], "leave one"),
            (&[("log.dirs", "/a,/b")], "one folder"),
            (&[("log.retention.hours", "0")], "log.retention.hours=0"),
            (&[("security.inter.broker.protocol", "SSL")], "cluster.tls"),
            (&[("listeners", "SSL://:9093")], "not there yet"),
            (&[("process.roles", "controller")], "every node is a broker"),
            (&[("authorizer.class.name", "x.Authorizer")], "no ACLs"),
            (&[("unclean.leader.election.enable", "true")], "on the topics"),
            (&[("remote.log.storage.system.enable", "true")], "not there yet"),
            (&[("controller.quorum.voters", "1@a:1,2@b:1")], "peers"),
            (&[("log.cleanup.policy", "compact")], "compaction"),
        ] {
            let refused = of([given, &[], &[]]).expect_err(why).to_string();
            assert!(refused.contains(why), "{given:?}: {refused}");
        }
    }

    #[test]
    fn unknown_names_come_with_the_one_that_was_meant() {
        for (name, meant) in [
            ("num.partitons", Some("num.partitions")),
            ("log_retention_ms", Some("log.retention.ms")),
            ("retention.ms", Some("log.retention.ms")),
            ("advertised.listener", Some("advertised.listeners")),
            ("num.io.thread", Some("num.io.threads")),
            ("something.else", None),
            ("x", None),
        ] {
            assert_eq!(closest(name).as_deref(), meant, "{name}");
        }
    }

    #[test]
    fn variables_of_a_kubernetes_service_are_no_settings() {
        let load = |name: &str| {
            let variable = (name.to_owned(), "tcp://10.0.0.1:9092".to_owned());
            Settings::default().load_environment([variable].into_iter())
        };
        for name in [
            "MILLRACE_SERVICE_HOST",
            "MILLRACE_SERVICE_PORT",
            "MILLRACE_SERVICE_PORT_KAFKA",
            "MILLRACE_PORT",
            "MILLRACE_PORT_9092_TCP",
            "MILLRACE_PORT_9192_UDP_PROTO",
            "MILLRACE_PORT_9092_TCP_PORT",
            "MILLRACE_PORT_9092_TCP_ADDR",
        ] {
            load(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        for name in [
            "MILLRACE_PORTS",
            "MILLRACE_PORT_X_TCP",
            "MILLRACE_PORT_9092_TCP_ADR",
            "MILLRACE_SERVICE",
        ] {
            assert!(matches!(load(name), Err(ConfigError::Unknown { .. })), "{name}");
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("64MiB", 64 << 20),
            ("2g", 2 << 30),
            ("1KB", 1024),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1.5g", "-1", "99999999999g"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
