package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Files are the three files that an agent or a command needs.
type Files struct {
	CA   string // PEM, one or more authorities that are trusted
	Cert string // PEM
	Key  string // PEM, PKCS#8, readable by its owner only
}

// FilesIn are the files of a folder that Issue wrote.
func FilesIn(dir string) Files {
	return Files{
		CA:   filepath.Join(dir, CACertFile),
		Cert: filepath.Join(dir, CertFile),
		Key:  filepath.Join(dir, KeyFile),
	}
}

// Identity is who this program is, and whom it trusts.
type Identity struct {
	Role Role
	Name string

	cert  tls.Certificate
	roots *x509.CertPool
	// now is the clock that certificates are held against.
	now func() time.Time
}

// Load reads an identity and checks that its parts belong together.
func Load(files Files) (*Identity, error) {
	cas, err := readCerts(files.CA)
	if err != nil {
		return nil, err
	}
	certs, err := readCerts(files.Cert)
	if err != nil {
		return nil, err
	}
	if _, err := readKey(files.Key); err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		return nil, fmt.Errorf("pki: load %s with %s: %w", files.Cert, files.Key, err)
	}
	id := &Identity{cert: cert, roots: x509.NewCertPool(), now: time.Now}
	for _, ca := range cas {
		id.roots.AddCert(ca)
	}
	if id.Role, id.Name, err = Identify(certs[0]); err != nil {
		return nil, fmt.Errorf("pki: %s: %w", files.Cert, err)
	}
	if _, err := id.verify(certs, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, fmt.Errorf("pki: our own certificate %s would be refused by every peer: %w", files.Cert, err)
	}
	return id, nil
}

// Expires is when the identity's own certificate ends.
func (id *Identity) Expires() time.Time { return id.cert.Leaf.NotAfter }

// Info is what a certificate is for.
type Info struct {
	Role        string    `json:"role"` // host, operator or authority
	Name        string    `json:"name"`
	Serial      string    `json:"serial"`      // hexadecimal
	Fingerprint string    `json:"fingerprint"` // SHA-256 over the DER, hexadecimal
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	Expired     bool      `json:"expired"`
	DNS         []string  `json:"dns,omitempty"`
	Addresses   []string  `json:"addresses,omitempty"`
	Issuer      string    `json:"issuer"`
}

// Show describes the certificates in a PEM file, or in a folder of Init or
// Issue.
func Show(path string) ([]Info, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("pki: show: %w", err)
	}
	paths := []string{path}
	if st.IsDir() {
		paths = nil
		for _, name := range []string{CertFile, CACertFile} {
			p := filepath.Join(path, name)
			if _, err := os.Stat(p); err == nil {
				paths = append(paths, p)
			}
		}
		if len(paths) == 0 {
			return nil, fmt.Errorf("pki: %s holds neither %s nor %s", path, CertFile, CACertFile)
		}
	}
	var infos []Info
	for _, p := range paths {
		certs, err := readCerts(p)
		if err != nil {
			return nil, err
		}
		for _, cert := range certs {
			infos = append(infos, describe(cert))
		}
	}
	return infos, nil
}

func describe(cert *x509.Certificate) Info {
	sum := sha256.Sum256(cert.Raw)
	info := Info{
		Name:        cert.Subject.CommonName,
		Serial:      cert.SerialNumber.Text(16),
		Fingerprint: hex.EncodeToString(sum[:]),
		NotBefore:   cert.NotBefore,
		NotAfter:    cert.NotAfter,
		Expired:     time.Now().After(cert.NotAfter),
		DNS:         cert.DNSNames,
		Issuer:      cert.Issuer.CommonName,
	}
	if role, name, err := Identify(cert); err == nil {
		info.Role, info.Name = string(role), name
	} else if cert.IsCA {
		info.Role = "authority"
	} else {
		info.Role = "unknown"
	}
	for _, ip := range cert.IPAddresses {
		info.Addresses = append(info.Addresses, ip.String())
	}
	return info
}

// readCerts reads every certificate of a PEM file, at least one.
func readCerts(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("pki: read a certificate: %w", err)
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("pki: parse %s: %w", path, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("pki: %s holds no certificate in PEM form", path)
	}
	return certs, nil
}

// readKey reads a key file and refuses one that others may read.
func readKey(path string) (*pem.Block, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("pki: open a key: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("pki: look at a key: %w", err)
	}
	if perm := st.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("pki: key %s is open to others (mode %04o): `chmod 600 %s`, and issue a new one if anybody may have read it", path, perm, path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("pki: read a key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("pki: " + path + " holds no private key in PEM form")
	}
	return block, nil
}
