//! Certificates: the cluster's CA and this node's, from files, or for development on one machine a CA of the user's own.

use std::{
    ffi::OsString,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use millrace_net::quic::Credentials;
use thiserror::Error;
use x509_parser::{parse_x509_certificate, pem::parse_x509_pem, time::ASN1Time};

use super::{
    Members,
    ca::{Ca, NODE_DAYS},
};
use crate::config::Settings;

/// Why there are no certificates.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A file.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What it holds.
    #[error("{path}: {reason}", path = path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// None were given.
    #[error(
        "nodes on several machines need certificates: make a CA with `millrace cluster init-ca`, a certificate for each node with \
         `millrace cluster issue`, and name them with cluster.tls.ca, cluster.tls.cert and cluster.tls.key"
    )]
    Missing,
    /// There is no folder of the user's own for a development CA.
    #[error(
        "no certificates were given, and there is no place for a development CA of this user's: set HOME or XDG_STATE_HOME, or name \
         certificates with cluster.tls.ca, cluster.tls.cert and cluster.tls.key"
    )]
    NoStateFolder,
    /// Others could have written, or can read, the development CA.
    #[error(
        "{path}: owned by user {owner}, mode {mode:o}: a CA that others can read or replace proves nothing; remove it, and the next \
         node to start makes a new one",
        path = path.display()
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// User id of its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// This node's certificate, or the CA's, is not valid any more, or not yet.
    #[error("{path}: it is valid from {from} to {to}, and it is {now}: {advice}", path = path.display())]
    NotValid {
        /// The file.
        path: PathBuf,
        /// First moment.
        from: String,
        /// Last moment.
        to: String,
        /// By this machine's clock.
        now: String,
        /// What to do.
        advice: &'static str,
    },
    /// Making one failed.
    #[error("a certificate cannot be made: {0}")]
    Make(String),
    /// They do not fit.
    #[error(transparent)]
    Tls(#[from] millrace_net::quic::tls::TlsError),
}

pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CredentialsError + '_ {
    move |source| CredentialsError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes a file that only this user may read and that must not be there yet.
///
/// # Errors
/// The system's.
pub fn write_new(path: &Path, text: &str) -> Result<(), CredentialsError> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io(path))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(io(path))
}

/// How long before a certificate ends the log begins to say so.
const SOON: Duration = Duration::from_hours(30 * 24);
/// How often it says so.
const REMIND: Duration = Duration::from_hours(24);

/// What this node shows and whom it believes, and until when that holds.
pub struct Loaded {
    /// For connections.
    pub credentials: Credentials,
    /// The certificate that ends first.
    pub first_to_end: Expiry,
}

/// When a certificate ends.
#[derive(Clone, Debug)]
pub struct Expiry {
    path: PathBuf,
    /// s since 1970.
    at: i64,
}

impl Expiry {
    /// Says once a day that the certificate ends soon, as long as `sleep` comes back.
    pub async fn remind(self, sleep: impl AsyncFn(Duration)) {
        loop {
            let left = self.at - ASN1Time::now().timestamp();
            if left < SOON.as_secs() as i64 {
                tracing::warn!(
                    certificate = %self.path.display(),
                    days_left = left.max(0) / 86_400,
                    "a certificate ends soon, and other nodes then refuse this one: issue another with `millrace cluster issue`, and start this \
                     node again with it"
                );
            }
            sleep(REMIND).await;
        }
    }
}

/// When the first certificate of a PEM text ends.
///
/// # Errors
/// It is none, or it is not valid now.
fn check_validity(path: &Path, pem: &[u8], advice: &'static str) -> Result<Expiry, CredentialsError> {
    let content = |reason: String| CredentialsError::Content {
        path: path.to_owned(),
        reason,
    };
    let (_, pem) = parse_x509_pem(pem).map_err(|e| content(e.to_string()))?;
    let (_, certificate) = parse_x509_certificate(&pem.contents).map_err(|e| content(e.to_string()))?;
    let validity = certificate.validity();
    if !validity.is_valid() {
        return Err(CredentialsError::NotValid {
            path: path.to_owned(),
            from: validity.not_before.to_string(),
            to: validity.not_after.to_string(),
            now: ASN1Time::now().to_string(),
            advice,
        });
    }
    Ok(Expiry {
        path: path.to_owned(),
        at: validity.not_after.timestamp(),
    })
}

/// What this node shows and whom it believes.
///
/// # Errors
/// [`CredentialsError`].
pub fn load(settings: &Settings, members: &Members, node: i32) -> Result<Loaded, CredentialsError> {
    let files = ["cluster.tls.ca", "cluster.tls.cert", "cluster.tls.key"].map(|s| settings.get(s));
    if files.iter().all(|f| f.is_empty()) {
        if !members.all_loopback() {
            return Err(CredentialsError::Missing);
        }
        let path = development_ca_path(|name| std::env::var_os(name)).ok_or(CredentialsError::NoStateFolder)?;
        tracing::warn!(
            ca = %path.display(),
            "no certificates were given; all nodes are on this machine, so a development CA of this user's is used"
        );
        let ca = development_ca(&path)?;
        let advice = "remove it, and start all nodes again: the first makes a new one";
        let first_to_end = check_validity(&path, ca.certificate.as_bytes(), advice)?;
        let (certificate, key) = ca.issue(node, NODE_DAYS)?;
        let (ca, certificate) = (ca.certificate.as_bytes(), certificate.as_bytes());
        return Ok(Loaded {
            credentials: Credentials::from_pem(ca, certificate, key.as_bytes(), None)?,
            first_to_end,
        });
    }
    let read = |file: &str| {
        if file.is_empty() {
            return Err(CredentialsError::Missing);
        }
        fs::read(file).map_err(io(Path::new(file)))
    };
    let [ca, certificate, key] = [read(files[0])?, read(files[1])?, read(files[2])?];
    let of_ca = check_validity(Path::new(files[0]), &ca, "the cluster needs another CA")?;
    let advice = "issue another with `millrace cluster issue`, or set the clock right";
    let of_node = check_validity(Path::new(files[1]), &certificate, advice)?;
    let revoked = match settings.get("cluster.tls.crl") {
        "" => None,
        file => Some(read(file)?),
    };
    Ok(Loaded {
        credentials: Credentials::from_pem(&ca, &certificate, &key, revoked.as_deref())?,
        first_to_end: if of_ca.at < of_node.at { of_ca } else { of_node },
    })
}

/// In the user's state folder (XDG base directories); `None` without one: folders that all users share are no place for a key.
fn development_ca_path(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let state = folder("XDG_STATE_HOME").or_else(|| folder("HOME").map(|h| h.join(".local/state")));
    state.map(|state| state.join("millrace/development-ca.pem"))
}

/// Fails unless the file is this user's, and nobody else may read or write it.
fn check_ours(path: &Path) -> Result<(), CredentialsError> {
    let (of, mode) = fs::symlink_metadata(path)
        .map(|m| (m.uid(), m.mode() & 0o7777))
        .map_err(io(path))?;
    if of != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(CredentialsError::NotOurs {
            path: path.to_owned(),
            owner: of,
            mode,
        });
    }
    Ok(())
}

/// The development CA; the first node to come makes it, however many start at once.
fn development_ca(path: &Path) -> Result<Ca, CredentialsError> {
    if !path.exists() {
        let dir = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(io(dir))?;
        let mine = dir.join(format!(
            "development-ca.{}.{}",
            std::process::id(),
            uuid::Uuid::new_v4().simple()
        ));
        write_new(&mine, &Ca::new()?.to_text())?;
        // A link is made by one of them, whole; the others find it there.
        let linked = fs::hard_link(&mine, path);
        fs::remove_file(&mine).map_err(io(&mine))?;
        match linked {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(path)(e)),
            _ => {}
        }
    }
    check_ours(path)?;
    Ca::from_text(&fs::read_to_string(path).map_err(io(path))?, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn nodes_that_start_at_once_find_one_development_ca() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("state/millrace/ca.pem");
        let found: Vec<String> = std::thread::scope(|s| {
            let all: Vec<_> = (0..8)
                .map(|_| s.spawn(|| development_ca(&path).expect("made").key))
                .collect();
            all.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        assert!(found.iter().all(|key| *key == found[0]));
    }

    #[test]
    fn a_development_ca_lies_where_only_its_user_can_put_it() {
        let none = |_: &str| None;
        assert_eq!(development_ca_path(none), None);
        let empty_state = |name: &str| Some(OsString::from(if name == "HOME" { "/home/a" } else { "" }));
        let path = development_ca_path(empty_state).expect("a home");
        assert_eq!(path, Path::new("/home/a/.local/state/millrace/development-ca.pem"));

        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("ca.pem");
        development_ca(&path).expect("made");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
        assert!(matches!(
            development_ca(&path),
            Err(CredentialsError::NotOurs { mode: 0o644, .. })
        ));
    }
}
