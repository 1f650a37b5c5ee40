package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// Expect is whom a client means to talk to.
type Expect struct {
	// Host is the name of the host that must answer, whatever the address.
	Host string
	// Address, used if Host is empty, is the name or IP address that was
	// dialled: the host's certificate must have it among its names.
	Address string
}

// ServerConfig is the configuration of a server that offers protos, in order
// of preference. The roles that it admits are the caller's business; see Peer.
func (id *Identity) ServerConfig(protos ...string) *tls.Config {
	c := id.config(protos)
	c.ClientAuth = tls.RequireAnyClientCert // verified below, in one place for both sides
	c.SessionTicketsDisabled = true
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := id.verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth)
		return err
	}
	return c
}

// ClientConfig is the configuration of a client that wants proto from a host.
func (id *Identity) ClientConfig(proto string, want Expect) *tls.Config {
	c := id.config([]string{proto})
	// Verification by URI name instead of the address, not none: below.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		cert, err := id.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth)
		if err != nil {
			return err
		}
		if err := want.check(cert); err != nil {
			return err
		}
		if cs.NegotiatedProtocol != proto {
			return fmt.Errorf("pki: the host does not speak %s", proto)
		}
		return nil
	}
	return c
}

func (id *Identity) config(protos []string) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{id.cert},
		NextProtos:   protos,
	}
}

func (e Expect) check(cert *x509.Certificate) error {
	role, name, err := Identify(cert)
	if err != nil {
		return err
	}
	if role != Host {
		return fmt.Errorf("%w: it is %s's, not a host's", ErrWrongRole, identityURI(role, name))
	}
	if e.Host != "" {
		if name != e.Host {
			return fmt.Errorf("%w: wanted host %q, but host %q answered", ErrWrongName, e.Host, name)
		}
		return nil
	}
	if err := cert.VerifyHostname(e.Address); err != nil && name != e.Address {
		return fmt.Errorf("%w: host %q answered, and its certificate does not name %q", ErrWrongName, name, e.Address)
	}
	return nil
}

// verify checks a peer's chain and that it has a role and a name.
func (id *Identity) verify(certs []*x509.Certificate, usage x509.ExtKeyUsage) (*x509.Certificate, error) {
	if len(certs) == 0 {
		return nil, ErrNoCertificate
	}
	opts := x509.VerifyOptions{
		Roots:         id.roots,
		Intermediates: x509.NewCertPool(),
		CurrentTime:   id.now(),
		KeyUsages:     []x509.ExtKeyUsage{usage},
	}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := certs[0].Verify(opts); err != nil {
		return nil, explain(certs[0], err)
	}
	if _, _, err := Identify(certs[0]); err != nil {
		return nil, err
	}
	return certs[0], nil
}

// explain says in our words why a chain is not good.
func explain(cert *x509.Certificate, err error) error {
	who := cert.Subject.CommonName
	if role, name, ierr := Identify(cert); ierr == nil {
		who = identityURI(role, name).String()
	}
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fmt.Errorf("%w (%s, issued by %q)", ErrWrongCA, who, cert.Issuer.CommonName)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("%w (%s, valid from %s to %s): check the clocks, or issue a new one", ErrExpired, who,
			cert.NotBefore.Format("2006-01-02 15:04"), cert.NotAfter.Format("2006-01-02 15:04"))
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return fmt.Errorf("%w (%s)", ErrWrongRole, who)
	}
	return fmt.Errorf("the certificate of %s: %w", who, err)
}

// Peer says who is at the other end of a connection whose handshake has been
// done with a configuration of this package.
func Peer(cs tls.ConnectionState) (Role, string, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return "", "", ErrNoCertificate
	}
	return Identify(cs.PeerCertificates[0])
}
