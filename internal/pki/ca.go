package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// The files of an authority's folder.
const (
	CACertFile = "ca.pem"     // to be copied to every host and operator
	CAKeyFile  = "ca-key.pem" // stays where it is
)

// The files of an issued folder, beside the authority's CACertFile.
const (
	CertFile = "cert.pem"
	KeyFile  = "key.pem"
)

// The lifetimes of certificates, unless told otherwise.
const (
	CALifetime   = 10 * 365 * 24 * time.Hour
	CertLifetime = 2 * 365 * 24 * time.Hour
)

// backdate is how far in the past a certificate's life begins, for peers whose
// clock is a little behind.
const backdate = 5 * time.Minute

// Init makes a new authority in dir, which is created if need be. It refuses
// to overwrite one: every certificate of the old one would be worthless.
func Init(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pki: create the authority's folder: %w", err)
	}
	for _, name := range []string{CAKeyFile, CACertFile} {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("pki: %s is there already: %w", path, fs.ErrExist)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pki: look at %s: %w", path, err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("pki: make the authority's key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: fmt.Sprintf("lmctl authority %x", serial.Bytes()[:4])},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CALifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("pki: sign the authority's certificate: %w", err)
	}
	if err := writeKey(filepath.Join(dir, CAKeyFile), key); err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, CACertFile), "CERTIFICATE", der, 0o644)
}

// Request asks for a certificate.
type Request struct {
	Role Role
	Name string
	// SANs are DNS names and IP addresses under which a host is also reached.
	// A host's own name is always among them.
	SANs []string
	// Lifetime is CertLifetime if zero, and never longer than the authority's.
	Lifetime time.Duration
}

// Issue has the authority in dir sign a certificate with a fresh key, and
// writes certificate, key and the authority's certificate into out, which is
// created if need be. It refuses to overwrite a key.
func Issue(dir string, req Request, out string) error {
	if err := CheckName(req.Name); err != nil {
		return err
	}
	if _, err := ParseRole(string(req.Role)); err != nil {
		return err
	}
	caCert, caKey, err := loadCA(dir)
	if err != nil {
		return err
	}
	template, err := newTemplate(req, caCert)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("pki: make a key for %s: %w", req.Name, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, caCert, key.Public(), caKey)
	if err != nil {
		return fmt.Errorf("pki: sign the certificate of %s: %w", req.Name, err)
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return fmt.Errorf("pki: create the folder for %s: %w", req.Name, err)
	}
	if err := writeKey(filepath.Join(out, KeyFile), key); err != nil {
		return err
	}
	if err := writePEM(filepath.Join(out, CertFile), "CERTIFICATE", der, 0o644); err != nil {
		return err
	}
	return copyCA(filepath.Join(out, CACertFile), caCert)
}

// newTemplate is the certificate that req asks for, unsigned.
func newTemplate(req Request, caCert *x509.Certificate) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	if req.Lifetime < 0 {
		return nil, fmt.Errorf("pki: lifetime %s: must not be negative", req.Lifetime)
	}
	if req.Lifetime == 0 {
		req.Lifetime = CertLifetime
	}
	now := time.Now()
	if now.After(caCert.NotAfter) {
		return nil, fmt.Errorf("pki: the authority's certificate ended on %s: make a new one with `lmctl pki init`", caCert.NotAfter.Format(time.DateOnly))
	}
	end := now.Add(req.Lifetime)
	if end.After(caCert.NotAfter) {
		end = caCert.NotAfter
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: req.Name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:                  []*url.URL{identityURI(req.Role, req.Name)},
	}
	if req.Role == Operator {
		if len(req.SANs) > 0 {
			return nil, errors.New("pki: an operator is no server: it takes no DNS names or addresses")
		}
		return t, nil
	}
	t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	t.DNSNames = []string{req.Name}
	for _, san := range req.SANs {
		if ip := net.ParseIP(san); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else if err := CheckName(san); err != nil {
			return nil, fmt.Errorf("pki: %q is neither an IP address nor a DNS name", san)
		} else if san != req.Name {
			t.DNSNames = append(t.DNSNames, san)
		}
	}
	return t, nil
}

func loadCA(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	certs, err := readCerts(filepath.Join(dir, CACertFile))
	if err != nil {
		return nil, nil, fmt.Errorf("pki: no authority in %s (make one with `lmctl pki init`): %w", dir, err)
	}
	block, err := readKey(filepath.Join(dir, CAKeyFile))
	if err != nil {
		return nil, nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("pki: read the authority's key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("pki: the authority's key is a %T, not an ECDSA key", parsed)
	}
	if !certs[0].IsCA || !key.PublicKey.Equal(certs[0].PublicKey) {
		return nil, nil, fmt.Errorf("pki: %s and %s in %s do not belong together", CACertFile, CAKeyFile, dir)
	}
	return certs[0], key, nil
}

// copyCA puts the authority's certificate beside an issued one. The same
// certificate may be there already, another one may not.
func copyCA(path string, ca *x509.Certificate) error {
	if have, err := readCerts(path); err == nil {
		for _, c := range have {
			if c.Equal(ca) {
				return nil
			}
		}
		return fmt.Errorf("pki: %s holds another authority's certificate", path)
	}
	return writePEM(path, "CERTIFICATE", ca.Raw, 0o644)
}

func newSerial() (*big.Int, error) {
	// 127 bits: positive, and never fewer than the 4 bytes a name is made of.
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("pki: draw a serial number: %w", err)
	}
	return serial.SetBit(serial, 126, 1), nil
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("pki: encode a key: %w", err)
	}
	return writePEM(path, "PRIVATE KEY", der, 0o600)
}

// writePEM creates a file that must not exist and makes it durable.
func writePEM(path, kind string, der []byte, mode fs.FileMode) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("pki: create a file that must not be there yet: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("pki: close: %w", cerr)
		}
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	if err := pem.Encode(f, &pem.Block{Type: kind, Bytes: der}); err != nil {
		return fmt.Errorf("pki: write %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("pki: sync %s: %w", path, err)
	}
	return nil
}
