//! Kafka's `listeners` and what belongs to it, as an address to listen on and one to tell clients. One listener, without TLS and SASL.

use std::collections::BTreeMap;

use super::kafka_names::elements;

/// What is given of them.
#[derive(Default)]
pub(super) struct Given<'a> {
    pub listeners: Option<&'a str>,
    pub advertised: Option<&'a str>,
    pub protocols: Option<&'a str>,
    pub of_controllers: Option<&'a str>,
}

/// What follows from that, as HOST:PORT.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct Addresses {
    pub listen: Option<String>,
    pub advertise: Option<String>,
}

/// One element of `listeners`.
struct Listener<'a> {
    name: String,
    /// `HOST:PORT`, the host possibly empty.
    address: &'a str,
}

fn listeners<'a>(setting: &str, list: &'a str, given: &Given<'_>) -> Result<Vec<Listener<'a>>, String> {
    let of_controllers: Vec<String> = elements(given.of_controllers.unwrap_or_default())
        .map(str::to_ascii_uppercase)
        .collect();
    let mut found = Vec::new();
    for element in elements(list) {
        let (name, address) = element
            .split_once("://")
            .ok_or_else(|| format!("{setting}: {element:?} is not NAME://HOST:PORT"))?;
        let name = name.to_ascii_uppercase();
        if !of_controllers.contains(&name) {
            found.push(Listener { name, address });
        }
    }
    Ok(found)
}

/// Reads them as Kafka does.
pub(super) fn read(given: &Given<'_>) -> Result<Addresses, String> {
    let told = given
        .advertised
        .map(|list| listeners("advertised.listeners", list, given))
        .transpose()?
        .unwrap_or_default();
    // Kafka's, if only the other is given.
    let everywhere = (!told.is_empty()).then_some("PLAINTEXT://:9092");
    let Some(list) = given.listeners.or(everywhere) else {
        return Ok(Addresses::default());
    };
    let found = listeners("listeners", list, given)?;
    let [listener] = found.as_slice() else {
        let names: Vec<&str> = found.iter().map(|l| l.name.as_str()).collect();
        return Err(format!(
            "listeners={list} has {} listeners for clients ({}), and one is supported: leave one, with the address told to \
             clients in advertised.listeners. Nodes reach each other at cluster.listen",
            names.len(),
            names.join(", ")
        ));
    };
    check_protocol(&listener.name, given)?;
    if let Some(other) = told.iter().find(|t| t.name != listener.name) {
        return Err(format!(
            "advertised.listeners names {}, which listeners does not have",
            other.name
        ));
    }
    if told.len() > 1 {
        return Err(format!("advertised.listeners names {} twice", listener.name));
    }
    let host_is_empty = listener.address.starts_with(':');
    Ok(Addresses {
        listen: Some(if host_is_empty {
            format!("0.0.0.0{}", listener.address)
        } else {
            listener.address.to_owned()
        }),
        advertise: told.first().map(|t| t.address.to_owned()),
    })
}

/// Fails unless a listener asks for neither TLS nor SASL.
fn check_protocol(name: &str, given: &Given<'_>) -> Result<(), String> {
    let mut protocols: BTreeMap<String, String> = BTreeMap::new();
    for element in elements(given.protocols.unwrap_or_default()) {
        let (name, protocol) = element
            .split_once(':')
            .ok_or_else(|| format!("listener.security.protocol.map: {element:?} is not NAME:PROTOCOL"))?;
        protocols.insert(name.trim().to_ascii_uppercase(), protocol.trim().to_ascii_uppercase());
    }
    match protocols.get(name).map_or(name, String::as_str) {
        "PLAINTEXT" => Ok(()),
        protocol @ ("SSL" | "SASL_PLAINTEXT" | "SASL_SSL") => Err(format!(
            "listener {name} asks for {protocol}: TLS and SASL for clients are not there yet, and without them everybody could \
             connect. Use a PLAINTEXT listener that only trusted hosts reach"
        )),
        _ => Err(format!(
            "nothing says which protocol listener {name} speaks: add {name}:PLAINTEXT to listener.security.protocol.map"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,client:plaintext";

    fn read(listeners: &str, advertised: &str) -> Result<(String, String), String> {
        let some = |list| Some(list).filter(|l: &&str| !l.is_empty());
        let given = Given {
            listeners: some(listeners),
            advertised: some(advertised),
            protocols: Some(MAP),
            of_controllers: Some("CONTROLLER"),
        };
        super::read(&given).map(|a| (a.listen.unwrap_or_default(), a.advertise.unwrap_or_default()))
    }

    #[test]
    fn one_listener_is_taken() {
        for (listeners, advertised, listen, advertise) in [
            ("", "", "", ""),
            (
                "PLAINTEXT://:9092,CONTROLLER://:9093",
                "PLAINTEXT://localhost:9092,CONTROLLER://localhost:9093",
                "0.0.0.0:9092",
                "localhost:9092",
            ),
            ("plaintext://10.0.0.1:9094", "", "10.0.0.1:9094", ""),
            (
                "CLIENT://[::1]:1",
                "CLIENT://[2001:db8::1]:2",
                "[::1]:1",
                "[2001:db8::1]:2",
            ),
            ("", "PLAINTEXT://broker-1:19092", "0.0.0.0:9092", "broker-1:19092"),
        ] {
            let expected = (listen.to_owned(), advertise.to_owned());
            assert_eq!(read(listeners, advertised), Ok(expected), "{listeners} {advertised}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for (listeners, advertised, why) in [
            ("SSL://:9093", "", "TLS and SASL for clients are not there yet"),
            (
                "SASL_PLAINTEXT://:9093",
                "",
                "TLS and SASL for clients are not there yet",
            ),
            ("SASL_SSL://:9093", "", "TLS and SASL for clients are not there yet"),
            (
                "PLAINTEXT://:9092,SSL://:9093",
                "",
                "2 listeners for clients (PLAINTEXT, SSL)",
            ),
            ("CONTROLLER://:9093", "", "0 listeners for clients"),
            ("OTHER://:9092", "", "OTHER:PLAINTEXT"),
            ("PLAINTEXT://:9092", "OTHER://x:9092", "names OTHER"),
            ("PLAINTEXT://:9092", "PLAINTEXT://x:1,PLAINTEXT://x:2", "twice"),
            (":9092", "", "NAME://HOST:PORT"),
        ] {
            let refused = read(listeners, advertised).expect_err(listeners);
            assert!(refused.contains(why), "{listeners}: {refused}");
        }
    }
}
