//! The cluster's certificate authority: it issues the nodes' certificates and lists those that are revoked.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use millrace_net::quic::tls::node_name;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use time::OffsetDateTime;
use x509_parser::{parse_x509_certificate, parse_x509_crl, pem::parse_x509_pem};

use super::credentials::{CredentialsError, io, write_new};

/// How long a CA is valid, days.
const CA_DAYS: u32 = 3_650;
/// How long a node's certificate is valid where nobody says otherwise, days.
pub const NODE_DAYS: u32 = 730;
/// A certificate is valid from so long before it was made: clocks differ.
const CLOCK_SKEW: Duration = Duration::from_hours(1);

fn make(error: rcgen::Error) -> CredentialsError {
    CredentialsError::Make(error.to_string())
}

fn valid_for(days: u32) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - CLOCK_SKEW, now + Duration::from_hours(24 * u64::from(days)))
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
        (params.not_before, params.not_after) = valid_for(CA_DAYS);
        let certificate = params.self_signed(&key).map_err(make)?;
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    fn issuer(&self) -> Result<Issuer<'_, KeyPair>, CredentialsError> {
        let key = KeyPair::from_pem(&self.key).map_err(make)?;
        Issuer::from_ca_cert_pem(&self.certificate, key).map_err(make)
    }

    /// Makes a node's certificate, valid for so many days, and its key.
    ///
    /// # Errors
    /// [`CredentialsError::Make`].
    pub fn issue(&self, node: i32, days: u32) -> Result<(String, String), CredentialsError> {
        let issuer = self.issuer()?;
        let key = KeyPair::generate().map_err(make)?;
        let mut params = CertificateParams::new(vec![node_name(node)]).map_err(make)?;
        params.distinguished_name.push(DnType::CommonName, node_name(node));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = valid_for(days);
        let certificate = params.signed_by(&key, &issuer).map_err(make)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Puts a certificate of this CA on its list of revoked ones, `ca.crl` in the CA's folder; returns how many are on it.
    ///
    /// # Errors
    /// The files', or the certificate is another CA's.
    pub fn revoke(&self, dir: &Path, certificate: &Path) -> Result<usize, CredentialsError> {
        let content = |path: &Path, reason: String| CredentialsError::Content {
            path: path.to_owned(),
            reason,
        };
        let der = |path: &Path, pem: &[u8]| -> Result<Vec<u8>, CredentialsError> {
            let (_, pem) = parse_x509_pem(pem).map_err(|e| content(path, e.to_string()))?;
            Ok(pem.contents)
        };
        let bytes = der(certificate, &fs::read(certificate).map_err(io(certificate))?)?;
        let (_, revoked) = parse_x509_certificate(&bytes).map_err(|e| content(certificate, e.to_string()))?;
        let own = der(dir, self.certificate.as_bytes())?;
        let (_, own) = parse_x509_certificate(&own).map_err(|e| content(dir, e.to_string()))?;
        if revoked.verify_signature(Some(own.public_key())).is_err() {
            let reason = format!("it is no certificate of the CA in {}", dir.display());
            return Err(content(certificate, reason));
        }
        let list = dir.join("ca.crl");
        let mut serials: BTreeSet<Vec<u8>> = BTreeSet::new();
        let (mut number, now) = (1, OffsetDateTime::now_utc());
        if list.exists() {
            let bytes = der(&list, &fs::read(&list).map_err(io(&list))?)?;
            let (_, known) = parse_x509_crl(&bytes).map_err(|e| content(&list, e.to_string()))?;
            serials.extend(known.iter_revoked_certificates().map(|r| r.raw_serial().to_vec()));
            let last = known.crl_number().and_then(|n| u64::try_from(n).ok());
            number = last.unwrap_or(0) + 1;
        }
        serials.insert(revoked.raw_serial().to_vec());
        let params = CertificateRevocationListParams {
            this_update: now,
            // Nodes do not look at it: a list holds until there is another.
            next_update: now + Duration::from_hours(24 * u64::from(CA_DAYS)),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: (serials.iter())
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(serial),
                    revocation_time: now,
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let text = params.signed_by(&self.issuer()?).and_then(|l| l.pem()).map_err(make)?;
        let new = dir.join("ca.crl.new");
        let _ = fs::remove_file(&new);
        write_new(&new, &text)?;
        fs::rename(&new, &list).map_err(io(&list))?;
        Ok(serials.len())
    }

    /// Both in one text.
    pub(super) fn to_text(&self) -> String {
        format!("{}{}", self.certificate, self.key)
    }

    pub(super) fn from_text(text: &str, path: &Path) -> Result<Self, CredentialsError> {
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

#[cfg(test)]
mod tests {
    use millrace_net::quic::Credentials;

    use super::*;

    #[test]
    fn a_stored_ca_issues_and_is_not_overwritten() {
        let dir = tempfile::tempdir().expect("temporary folder");
        Ca::new().expect("drawn").store(dir.path()).expect("stored");
        let ca = Ca::load(dir.path()).expect("there");
        let (certificate, key) = ca.issue(7, 1).expect("issued");
        Credentials::from_pem(ca.certificate.as_bytes(), certificate.as_bytes(), key.as_bytes(), None).expect("sound");
        assert!(Ca::new().expect("drawn").store(dir.path()).is_err());
    }

    #[test]
    fn certificates_are_revoked_one_after_the_other() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let ca = Ca::new().expect("drawn");
        let issue = |ca: &Ca, name: &str| {
            let path = dir.path().join(name);
            write_new(&path, &ca.issue(3, 1).expect("issued").0).expect("written");
            path
        };
        let (first, second) = (issue(&ca, "a"), issue(&ca, "b"));
        assert_eq!(ca.revoke(dir.path(), &first).expect("listed"), 1);
        assert_eq!(ca.revoke(dir.path(), &second).expect("listed"), 2);
        assert_eq!(ca.revoke(dir.path(), &first).expect("once"), 2);
        let list = fs::read(dir.path().join("ca.crl")).expect("there");
        let (certificate, key) = ca.issue(4, 1).expect("issued");
        let own = (ca.certificate.as_bytes(), certificate.as_bytes(), key.as_bytes());
        Credentials::from_pem(own.0, own.1, own.2, Some(&list)).expect("sound");
        let strange = issue(&Ca::new().expect("drawn"), "c");
        let refused = ca.revoke(dir.path(), &strange).expect_err("another CA's");
        assert!(refused.to_string().contains("no certificate of the CA"), "{refused}");
    }
}
