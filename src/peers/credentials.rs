//! Certificates: the cluster's CA and this node's, from files, or for development on one machine a CA of the user's own.

use std::{
    ffi::OsString,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use millrace_net::quic::{Credentials, tls::node_name};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use thiserror::Error;

use super::Members;
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
    /// Making one failed.
    #[error("a certificate cannot be made: {0}")]
    Make(String),
    /// They do not fit.
    #[error(transparent)]
    Tls(#[from] millrace_net::quic::tls::TlsError),
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CredentialsError + '_ {
    move |source| CredentialsError::Io {
        path: path.to_owned(),
        source,
    }
}

fn make(error: rcgen::Error) -> CredentialsError {
    CredentialsError::Make(error.to_string())
}

/// A CA's certificate and key as PEM.
pub struct Ca {
    /// Certificate.
    pub certificate: String,
    /// Key: whoever has it can make nodes.
    pub key: String,
}

impl Ca {
    /// Draws a new one.
    ///
    /// # Errors
    /// [`CredentialsError::Make`].
    pub fn new() -> Result<Self, CredentialsError> {
        let key = KeyPair::generate().map_err(make)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(make)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "Millrace cluster CA");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(make)?;
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Makes a node's certificate and key.
    ///
    /// # Errors
    /// [`CredentialsError::Make`].
    pub fn issue(&self, node: i32) -> Result<(String, String), CredentialsError> {
        let ca_key = KeyPair::from_pem(&self.key).map_err(make)?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, ca_key).map_err(make)?;
        let key = KeyPair::generate().map_err(make)?;
        let mut params = CertificateParams::new(vec![node_name(node)]).map_err(make)?;
        params.distinguished_name.push(DnType::CommonName, node_name(node));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer).map_err(make)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Both in one text.
    fn to_text(&self) -> String {
        format!("{}{}", self.certificate, self.key)
    }

    fn from_text(text: &str, path: &Path) -> Result<Self, CredentialsError> {
        let at = text
            .find("-----BEGIN PRIVATE KEY")
            .ok_or_else(|| CredentialsError::Content {
                path: path.to_owned(),
                reason: "it holds no CA of ours; remove it and start again".into(),
            })?;
        Ok(Self {
            certificate: text[..at].to_owned(),
            key: text[at..].to_owned(),
        })
    }

    /// Stores a new CA as `ca.pem` and `ca.key`.
    ///
    /// # Errors
    /// The folder's, or files that are there already.
    pub fn store(&self, dir: &Path) -> Result<(), CredentialsError> {
        fs::create_dir_all(dir).map_err(io(dir))?;
        write_new(&dir.join("ca.key"), &self.key)?;
        write_new(&dir.join("ca.pem"), &self.certificate)
    }

    /// Reads a stored CA.
    ///
    /// # Errors
    /// The files'.
    pub fn load(dir: &Path) -> Result<Self, CredentialsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| CredentialsError::Io { path, source })
        };
        Ok(Self {
            certificate: read("ca.pem")?,
            key: read("ca.key")?,
        })
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

/// What this node shows and whom it believes.
///
/// # Errors
/// [`CredentialsError`].
pub fn load(settings: &Settings, members: &Members, node: i32) -> Result<Credentials, CredentialsError> {
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
        let (certificate, key) = ca.issue(node)?;
        return Ok(Credentials::from_pem(
            ca.certificate.as_bytes(),
            certificate.as_bytes(),
            key.as_bytes(),
        )?);
    }
    let read = |file: &str| {
        if file.is_empty() {
            return Err(CredentialsError::Missing);
        }
        fs::read(file).map_err(io(Path::new(file)))
    };
    Ok(Credentials::from_pem(
        &read(files[0])?,
        &read(files[1])?,
        &read(files[2])?,
    )?)
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

    #[test]
    fn a_stored_ca_issues_and_is_not_overwritten() {
        let dir = tempfile::tempdir().expect("temporary folder");
        Ca::new().expect("drawn").store(dir.path()).expect("stored");
        let ca = Ca::load(dir.path()).expect("there");
        let (certificate, key) = ca.issue(7).expect("issued");
        Credentials::from_pem(ca.certificate.as_bytes(), certificate.as_bytes(), key.as_bytes()).expect("sound");
        assert!(Ca::new().expect("drawn").store(dir.path()).is_err());
    }
}
