//! TLS 1.3 both ways: both sides show a certificate of the cluster's CA, made out to `node-N.millrace`.

use std::sync::Arc;

use quinn::{
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
    rustls::{
        self, ClientConfig, RootCertStore, ServerConfig,
        client::{WebPkiServerVerifier, verify_server_name},
        pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, pem::PemObject},
        server::{ParsedCertificate, WebPkiClientVerifier},
    },
};
use thiserror::Error;

/// Protocol name in the handshake; a change that no version range can bridge would take another.
const ALPN: &[u8] = b"millrace/1";

/// Why certificates cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file's content.
    #[error("{what}: {reason}")]
    Pem {
        /// Which.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// They do not fit together.
    #[error("the cluster's certificates cannot be used: {0}")]
    Rustls(#[from] rustls::Error),
    /// No usable root.
    #[error("the cluster's CA cannot be used: {0}")]
    Verifier(String),
}

/// What a node shows and whom it believes.
#[derive(Debug)]
pub struct Credentials {
    ca: Vec<CertificateDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Lists of revoked certificates; with any, a certificate of an issuer without a list is refused.
    revoked: Vec<CertificateRevocationListDer<'static>>,
}

/// The name in a node's certificate.
#[must_use]
pub fn node_name(node: i32) -> String {
    format!("node-{node}.millrace")
}

impl Credentials {
    /// From PEM texts: the CA's certificate, this node's chain, its key, and the CA's list of revoked certificates.
    ///
    /// # Errors
    /// [`TlsError::Pem`] naming the text.
    pub fn from_pem(ca: &[u8], chain: &[u8], key: &[u8], revoked: Option<&[u8]>) -> Result<Self, TlsError> {
        let certificates = |what: &'static str, pem: &[u8]| {
            let list: Vec<_> = CertificateDer::pem_slice_iter(pem)
                .collect::<Result<_, _>>()
                .map_err(|e| TlsError::Pem {
                    what,
                    reason: e.to_string(),
                })?;
            if list.is_empty() {
                return Err(TlsError::Pem {
                    what,
                    reason: "it holds no certificate".into(),
                });
            }
            Ok(list)
        };
        let lists = |pem: &[u8]| {
            let bad = |reason: String| TlsError::Pem {
                what: "the list of revoked certificates",
                reason,
            };
            let list: Vec<_> = CertificateRevocationListDer::pem_slice_iter(pem)
                .collect::<Result<_, _>>()
                .map_err(|e| bad(e.to_string()))?;
            if list.is_empty() {
                return Err(bad("it holds no list".into()));
            }
            Ok(list)
        };
        Ok(Self {
            ca: certificates("the cluster CA", ca)?,
            chain: certificates("the node's certificate", chain)?,
            key: PrivateKeyDer::from_pem_slice(key).map_err(|e| TlsError::Pem {
                what: "the node's key",
                reason: e.to_string(),
            })?,
            revoked: match revoked {
                Some(pem) => lists(pem)?,
                None => Vec::new(),
            },
        })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in &self.ca {
            roots.add(certificate.clone())?;
        }
        Ok(Arc::new(roots))
    }

    pub(super) fn server(&self) -> Result<quinn::ServerConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, Arc::clone(&provider))
            .with_crls(self.revoked.iter().cloned())
            .only_check_end_entity_revocation()
            .build()
            .map_err(|e| TlsError::Verifier(e.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        let config = QuicServerConfig::try_from(config).map_err(|e| TlsError::Verifier(e.to_string()))?;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(config)))
    }

    pub(super) fn client(&self) -> Result<quinn::ClientConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots()?, Arc::clone(&provider))
            .with_crls(self.revoked.iter().cloned())
            .only_check_end_entity_revocation()
            .build()
            .map_err(|e| TlsError::Verifier(e.to_string()))?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        let config = QuicClientConfig::try_from(config).map_err(|e| TlsError::Verifier(e.to_string()))?;
        Ok(quinn::ClientConfig::new(Arc::new(config)))
    }
}

/// Whether a peer's certificate, which the handshake has checked against the CA, is made out to a node.
pub(super) fn names_node(chain: &[CertificateDer<'_>], node: i32) -> bool {
    let name = ServerName::try_from(node_name(node)).ok();
    let leaf = chain.first().and_then(|c| ParsedCertificate::try_from(c).ok());
    match (leaf, name) {
        (Some(leaf), Some(name)) => verify_server_name(&leaf, &name).is_ok(),
        _ => false,
    }
}
