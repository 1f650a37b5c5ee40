package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority makes a CA in a fresh folder.
func authority(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if err := Init(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func issue(t *testing.T, ca string, req Request) *Identity {
	t.Helper()
	out := filepath.Join(t.TempDir(), req.Name)
	if err := Issue(ca, req, out); err != nil {
		t.Fatal(err)
	}
	id, err := Load(FilesIn(out))
	if err != nil {
		t.Fatal(err)
	}
	if id.Role != req.Role || id.Name != req.Name {
		t.Fatalf("issued %s %s, loaded %s %s", req.Role, req.Name, id.Role, id.Name)
	}
	return id
}

// meet has two identities shake hands on loopback and returns what each side
// says.
func meet(t *testing.T, server, client *Identity, proto string, want Expect) (tls.ConnectionState, error, error) {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server.ServerConfig(ALPNAPI, ALPNMigrate))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	type result struct {
		cs  tls.ConnectionState
		err error
	}
	done := make(chan result, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			done <- result{err: err}
			return
		}
		defer conn.Close()
		tc := conn.(*tls.Conn)
		err = tc.Handshake()
		done <- result{tc.ConnectionState(), err}
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	c := tls.Client(raw, client.ClientConfig(proto, want))
	cerr := c.Handshake()
	if cerr == nil {
		// A client of TLS 1.3 learns that it was refused when it reads.
		if _, err := c.Read(make([]byte, 1)); err != nil && !errors.Is(err, net.ErrClosed) && err.Error() != "EOF" {
			cerr = err
		}
	}
	r := <-done
	return r.cs, r.err, cerr
}

func TestHandshake(t *testing.T) {
	ca := authority(t)
	alpha := issue(t, ca, Request{Role: Host, Name: "alpha", SANs: []string{"127.0.0.1", "alpha.example.org"}})
	beta := issue(t, ca, Request{Role: Host, Name: "beta"})
	ann := issue(t, ca, Request{Role: Operator, Name: "ann"})
	other := issue(t, authority(t), Request{Role: Host, Name: "alpha"})
	late := issue(t, ca, Request{Role: Host, Name: "late"})
	late.now = func() time.Time { return time.Now().Add(3 * CertLifetime / 2) }

	for _, tc := range []struct {
		name           string
		server, client *Identity
		proto          string
		want           Expect
		serverErr      error
		clientErr      error
		clientText     string
	}{
		{name: "host by name", server: alpha, client: beta, proto: ALPNMigrate, want: Expect{Host: "alpha"}},
		{name: "operator by address", server: alpha, client: ann, proto: ALPNAPI, want: Expect{Address: "127.0.0.1"}},
		{name: "operator by dns name", server: alpha, client: ann, proto: ALPNAPI, want: Expect{Address: "alpha.example.org"}},
		{name: "another host answers", server: alpha, client: beta, proto: ALPNAPI, want: Expect{Host: "gamma"}, clientErr: ErrWrongName},
		{name: "address not in the certificate", server: beta, client: ann, proto: ALPNAPI, want: Expect{Address: "127.0.0.1"}, clientErr: ErrWrongName},
		{name: "server of another authority", server: other, client: beta, proto: ALPNAPI, want: Expect{Host: "alpha"}, clientErr: ErrWrongCA},
		{name: "client of another authority", server: alpha, client: skipServer(other, alpha), proto: ALPNAPI, want: Expect{Host: "alpha"}, serverErr: ErrWrongCA, clientText: "bad certificate"},
		{name: "an operator as a server", server: ann, client: beta, proto: ALPNAPI, want: Expect{Host: "ann"}, clientErr: ErrWrongRole},
		{name: "expired client", server: late, client: beta, proto: ALPNAPI, want: Expect{Host: "late"}, serverErr: ErrExpired, clientText: "bad certificate"},
		{name: "unknown protocol", server: alpha, client: beta, proto: "lmctl-other/1", want: Expect{Host: "alpha"}, clientText: "no application protocol"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cs, serr, cerr := meet(t, tc.server, tc.client, tc.proto, tc.want)
			if tc.serverErr != nil && !errors.Is(serr, tc.serverErr) {
				t.Errorf("server: %v, want %v", serr, tc.serverErr)
			}
			if tc.clientErr != nil && !errors.Is(cerr, tc.clientErr) {
				t.Errorf("client: %v, want %v", cerr, tc.clientErr)
			}
			if tc.clientText != "" && (cerr == nil || !strings.Contains(cerr.Error(), tc.clientText)) {
				t.Errorf("client: %v, want %q", cerr, tc.clientText)
			}
			if tc.serverErr != nil || tc.clientErr != nil || tc.clientText != "" {
				return
			}
			if serr != nil || cerr != nil {
				t.Fatalf("server %v, client %v", serr, cerr)
			}
			role, name, err := Peer(cs)
			if err != nil || role != tc.client.Role || name != tc.client.Name {
				t.Errorf("peer %s %s %v", role, name, err)
			}
			if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != tc.proto {
				t.Errorf("version %x protocol %q", cs.Version, cs.NegotiatedProtocol)
			}
		})
	}
}

// skipServer is id, trusting whom friend trusts.
func skipServer(id, friend *Identity) *Identity {
	c := *id
	c.roots = friend.roots
	return &c
}

func TestServerWantsCertificate(t *testing.T) {
	ca := authority(t)
	alpha := issue(t, ca, Request{Role: Host, Name: "alpha"})
	nobody := issue(t, ca, Request{Role: Operator, Name: "nobody"})
	nobody.cert = tls.Certificate{}
	_, serr, cerr := meet(t, alpha, nobody, ALPNAPI, Expect{Host: "alpha"})
	if serr == nil || cerr == nil {
		t.Fatalf("a client without a certificate got in: server %v, client %v", serr, cerr)
	}
}

func TestOldTLSRefused(t *testing.T) {
	ca := authority(t)
	alpha := issue(t, ca, Request{Role: Host, Name: "alpha"})
	beta := issue(t, ca, Request{Role: Host, Name: "beta"})
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	old := beta.ClientConfig(ALPNAPI, Expect{Host: "alpha"})
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	go tls.Client(theirs, old).Handshake() //nolint:errcheck // the server's word is what counts
	if err := tls.Server(ours, alpha.ServerConfig(ALPNAPI)).Handshake(); err == nil {
		t.Fatal("TLS 1.2 was accepted")
	}
}

func TestInitRefusesToOverwrite(t *testing.T) {
	ca := authority(t)
	if err := Init(ca); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("second Init: %v", err)
	}
	st, err := os.Stat(filepath.Join(ca, CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o600 {
		t.Errorf("authority's key has mode %04o", st.Mode().Perm())
	}
}

func TestIssueRefuses(t *testing.T) {
	ca := authority(t)
	out := filepath.Join(t.TempDir(), "out")
	for _, tc := range []struct {
		name string
		req  Request
		want string
	}{
		{"no name", Request{Role: Host}, "name"},
		{"odd name", Request{Role: Host, Name: "../x"}, "name"},
		{"odd role", Request{Role: "king", Name: "x"}, "role"},
		{"operator with a DNS name", Request{Role: Operator, Name: "x", SANs: []string{"x"}}, "no server"},
		{"odd SAN", Request{Role: Host, Name: "x", SANs: []string{"*.x"}}, "neither"},
	} {
		if err := Issue(ca, tc.req, out); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if err := Issue(t.TempDir(), Request{Role: Host, Name: "x"}, out); err == nil || !strings.Contains(err.Error(), "lmctl pki init") {
		t.Errorf("without an authority: %v", err)
	}
	if err := Issue(ca, Request{Role: Host, Name: "x"}, out); err != nil {
		t.Fatal(err)
	}
	if err := Issue(ca, Request{Role: Host, Name: "x"}, out); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second issue into one folder: %v", err)
	}
}

func TestLoadRefusesOpenKey(t *testing.T) {
	ca := authority(t)
	out := filepath.Join(t.TempDir(), "x")
	if err := Issue(ca, Request{Role: Host, Name: "x"}, out); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(out, KeyFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(FilesIn(out)); err == nil || !strings.Contains(err.Error(), "open to others") {
		t.Fatalf("load: %v", err)
	}
}

func TestLoadRefusesStrangers(t *testing.T) {
	a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	if err := Issue(authority(t), Request{Role: Host, Name: "a"}, a); err != nil {
		t.Fatal(err)
	}
	if err := Issue(authority(t), Request{Role: Host, Name: "b"}, b); err != nil {
		t.Fatal(err)
	}
	files := FilesIn(a)
	files.CA = FilesIn(b).CA
	if _, err := Load(files); !errors.Is(err, ErrWrongCA) {
		t.Errorf("certificate of another authority: %v", err)
	}
	files = FilesIn(a)
	files.Key = FilesIn(b).Key
	if _, err := Load(files); err == nil {
		t.Error("a key that does not belong to the certificate was loaded")
	}
}

func TestShow(t *testing.T) {
	ca := authority(t)
	out := filepath.Join(t.TempDir(), "x")
	if err := Issue(ca, Request{Role: Host, Name: "x", SANs: []string{"192.0.2.1", "x.example"}}, out); err != nil {
		t.Fatal(err)
	}
	infos, err := Show(out)
	if err != nil {
		t.Fatal(err)
	}
	if len(infos) != 2 || infos[0].Role != "host" || infos[0].Name != "x" || infos[1].Role != "authority" {
		t.Fatalf("show: %+v", infos)
	}
	if got := strings.Join(infos[0].DNS, " ") + " " + strings.Join(infos[0].Addresses, " "); got != "x x.example 192.0.2.1" {
		t.Errorf("names: %s", got)
	}
	if infos[0].Issuer != infos[1].Name || infos[0].Expired || len(infos[0].Fingerprint) != 64 {
		t.Errorf("show: %+v", infos[0])
	}
	if _, err := Show(t.TempDir()); err == nil {
		t.Error("an empty folder was shown")
	}
}

func TestIdentify(t *testing.T) {
	for _, tc := range []struct {
		uris []string
		ok   bool
	}{
		{[]string{"lmctl://host/a"}, true},
		{[]string{"https://x/", "lmctl://operator/a.b"}, true},
		{nil, false},
		{[]string{"lmctl://host/a", "lmctl://host/b"}, false},
		{[]string{"lmctl://host/a/b"}, false},
		{[]string{"lmctl://host/a?x=1"}, false},
		{[]string{"lmctl://host/a#f"}, false},
		{[]string{"lmctl://u@host/a"}, false},
		{[]string{"lmctl://host/"}, false},
		{[]string{"lmctl:host/a"}, false},
		{[]string{"lmctl://king/a"}, false},
		{[]string{"lmctl://host/%61"}, false},
	} {
		cert := &x509.Certificate{}
		for _, s := range tc.uris {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			cert.URIs = append(cert.URIs, u)
		}
		role, name, err := Identify(cert)
		if (err == nil) != tc.ok {
			t.Errorf("%v: %s %s %v", tc.uris, role, name, err)
		}
		if err != nil && !errors.Is(err, ErrNoIdentity) {
			t.Errorf("%v: %v is not ErrNoIdentity", tc.uris, err)
		}
	}
}
