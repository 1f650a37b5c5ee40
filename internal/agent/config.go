package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/goccy/go-yaml"

	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/migrate"
)

// DefaultConfigPath is where the configuration is unless told otherwise.
const DefaultConfigPath = "/etc/lmctl/agent.yaml"

// DefaultSocket is where the agent listens for the local root.
const DefaultSocket = "/run/lmctl/agent.sock"

// Config is an agent's configuration. Every key has a default.
type Config struct {
	Name          string            `yaml:"name"`
	Listen        string            `yaml:"listen"`
	Advertise     string            `yaml:"advertise"`
	Socket        string            `yaml:"socket"`
	StateDir      string            `yaml:"state_dir"`
	RunDir        string            `yaml:"run_dir"`
	MemoryDir     string            `yaml:"memory_dir"`
	MemoryReserve Size              `yaml:"memory_reserve"`
	TLS           TLSConfig         `yaml:"tls"`
	Peers         map[string]string `yaml:"peers"`
	Hypervisor    string            `yaml:"hypervisor"`
	Libvirt       LibvirtConfig     `yaml:"libvirt"`
	Metrics       string            `yaml:"metrics"`
	Log           LogConfig         `yaml:"log"`
	PeerTimeout   time.Duration     `yaml:"peer_timeout"`
	Migration     MigrationConfig   `yaml:"migration"`
	StopTimeout   time.Duration     `yaml:"stop_timeout"`
	Limits        LimitsConfig      `yaml:"limits"`
}

// TLSConfig names the files of the agent's certificate.
type TLSConfig struct {
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// LogConfig says what is logged and how.
type LogConfig struct {
	Level  string `yaml:"level"`
	Format string `yaml:"format"`
}

// LibvirtConfig says how to reach the host's libvirtd.
type LibvirtConfig struct {
	URI string `yaml:"uri"`
}

// MigrationConfig is what a migration does unless its request says otherwise.
type MigrationConfig struct {
	MaxPasses      int           `yaml:"max_passes"`
	DowntimeTarget time.Duration `yaml:"downtime_target"`
	Bandwidth      Size          `yaml:"bandwidth"`
	Streams        int           `yaml:"streams"`
	Timeout        time.Duration `yaml:"timeout"`
	History        int           `yaml:"history"`
}

// LimitsConfig bounds what others can make the agent do.
type LimitsConfig struct {
	Handshakes       int           `yaml:"handshakes"`
	HandshakeTimeout time.Duration `yaml:"handshake_timeout"`
	Connections      int           `yaml:"connections"`
	Migrations       int           `yaml:"migrations"`
}

// Size is a number of bytes, written like 512MiB.
type Size int64

// MarshalYAML writes the size with a binary unit where one divides it.
func (s Size) MarshalYAML() ([]byte, error) { return []byte(s.String()), nil }

// String writes the size with the largest binary unit that divides it.
func (s Size) String() string {
	n, i := int64(s), 0
	units := []string{"", "KiB", "MiB", "GiB", "TiB"}
	for n != 0 && n%1024 == 0 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	return fmt.Sprintf("%d%s", n, units[i])
}

// UnmarshalYAML reads a size, which may end in /s for a rate.
func (s *Size) UnmarshalYAML(b []byte) error {
	n, err := ParseSize(strings.Trim(strings.TrimSpace(string(b)), `"'`))
	if err != nil {
		return err
	}
	*s = Size(n)
	return nil
}

// ParseSize reads a number of bytes, like 512MiB, or a rate, like 100MiB/s.
func ParseSize(text string) (int64, error) {
	n, err := humanize.ParseBytes(strings.TrimSuffix(text, "/s"))
	if err != nil || n > 1<<62 {
		return 0, fmt.Errorf("%q is no size: write it like 512MiB", text)
	}
	return int64(n), nil
}

// DefaultConfig is the configuration without a file.
func DefaultConfig() (Config, error) {
	name, err := os.Hostname()
	if err != nil {
		return Config{}, fmt.Errorf("agent: host name: %w", err)
	}
	name, _, _ = strings.Cut(name, ".")
	return Config{
		Name: name, Listen: "0.0.0.0:7410", Socket: DefaultSocket,
		StateDir: "/var/lib/lmctl", RunDir: "/run/lmctl", MemoryDir: "/dev/shm/lmctl", MemoryReserve: 64 << 20,
		TLS:   TLSConfig{CA: "/etc/lmctl/tls/ca.pem", Cert: "/etc/lmctl/tls/cert.pem", Key: "/etc/lmctl/tls/key.pem"},
		Peers: map[string]string{}, Hypervisor: "qemu", Libvirt: LibvirtConfig{URI: "qemu:///system"}, Metrics: "127.0.0.1:9410",
		Log:         LogConfig{Level: "info", Format: "text"},
		PeerTimeout: 5 * time.Second, StopTimeout: time.Minute,
		Migration: MigrationConfig{MaxPasses: 8, DowntimeTarget: 30 * time.Millisecond, Streams: 2, History: 200},
		Limits:    LimitsConfig{Handshakes: 32, HandshakeTimeout: 5 * time.Second, Connections: 256, Migrations: 4},
	}, nil
}

// LoadConfig reads a configuration. Without a file at the default path it is
// the default one.
func LoadConfig(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil && (path != DefaultConfigPath || !errors.Is(err, fs.ErrNotExist)) {
		return Config{}, fmt.Errorf("agent: configuration: %w", err)
	}
	cfg, err := ParseConfig(text)
	if err != nil {
		return Config{}, fmt.Errorf("agent: configuration %s: %w", path, err)
	}
	return cfg, nil
}

// ParseConfig reads a configuration over the defaults. An error names line and
// key.
func ParseConfig(text []byte) (Config, error) {
	cfg, err := DefaultConfig()
	if err != nil {
		return Config{}, err
	}
	// A document that says nothing would empty the configuration.
	var says any
	if err := yaml.Unmarshal(text, &says); err != nil {
		return Config{}, errors.New(strings.TrimSpace(yaml.FormatError(err, false, true)))
	}
	if says != nil {
		if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(&cfg); err != nil {
			return Config{}, errors.New(strings.TrimSpace(yaml.FormatError(err, false, true)))
		}
	}
	if err := cfg.Check(); err != nil {
		return Config{}, err
	}
	return cfg, nil
}

// Check says everything that is wrong with a configuration.
func (c Config) Check() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if err := pki.CheckName(c.Name); err != nil {
		bad("name", "%v", err)
	}
	for key, addr := range map[string]string{"listen": c.Listen, "advertise": c.Advertise} {
		if addr != "" && !isAddress(addr) {
			bad(key, "%q is not ADDRESS:PORT", addr)
		}
	}
	for key, path := range map[string]string{"socket": c.Socket, "state_dir": c.StateDir, "run_dir": c.RunDir, "memory_dir": c.MemoryDir} {
		if !filepath.IsAbs(path) {
			bad(key, "%q must be an absolute path", path)
		}
	}
	for name, addr := range c.Peers {
		if pki.CheckName(name) != nil || name == c.Name {
			bad("peers", "%q cannot be another host's name", name)
		}
		if !isAddress(addr) {
			bad("peers."+name, "%q is not ADDRESS:PORT", addr)
		}
	}
	if c.Hypervisor != "qemu" && c.Hypervisor != "libvirt" {
		bad("hypervisor", "%q is not known: must be qemu or libvirt", c.Hypervisor)
	}
	if uri, err := url.Parse(c.Libvirt.URI); err != nil || !strings.HasPrefix(uri.Scheme, "qemu") {
		bad("libvirt.uri", "%q is no URI of a libvirtd with QEMU, like qemu:///system", c.Libvirt.URI)
	}
	if path, unix := strings.CutPrefix(c.Metrics, "unix:"); unix && !filepath.IsAbs(path) || !unix && c.Metrics != "" && !isAddress(c.Metrics) {
		bad("metrics", "%q is neither ADDRESS:PORT nor unix:/PATH", c.Metrics)
	}
	if _, err := c.Log.level(); err != nil {
		bad("log.level", "%q: must be debug, info, warn or error", c.Log.Level)
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		bad("log.format", "%q: must be text or json", c.Log.Format)
	}
	c.checkNumbers(bad)
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func (c Config) checkNumbers(bad func(key, format string, args ...any)) {
	for key, d := range map[string]time.Duration{"peer_timeout": c.PeerTimeout, "limits.handshake_timeout": c.Limits.HandshakeTimeout,
		"migration.downtime_target": c.Migration.DowntimeTarget} {
		if d <= 0 {
			bad(key, "%s must be more than nothing", d)
		}
	}
	for key, d := range map[string]time.Duration{"stop_timeout": c.StopTimeout, "migration.timeout": c.Migration.Timeout} {
		if d < 0 {
			bad(key, "%s must not be negative", d)
		}
	}
	for key, n := range map[string]int{"migration.max_passes": c.Migration.MaxPasses, "migration.streams": c.Migration.Streams,
		"limits.handshakes": c.Limits.Handshakes, "limits.connections": c.Limits.Connections, "limits.migrations": c.Limits.Migrations} {
		if n < 1 {
			bad(key, "%d must be at least 1", n)
		}
	}
	if c.Migration.Streams > migrate.MaxStreams {
		bad("migration.streams", "%d must be at most %d", c.Migration.Streams, migrate.MaxStreams)
	}
	if c.Migration.History < 0 {
		bad("migration.history", "%d must not be negative", c.Migration.History)
	}
}

func isAddress(s string) bool {
	_, port, err := net.SplitHostPort(s)
	return err == nil && port != ""
}

// comments explain the keys in what --print-config prints.
var comments = map[string]string{
	"$.name":                      "this host's name, as its certificate says",
	"$.listen":                    "for operators and other hosts, TLS; empty for none",
	"$.advertise":                 "under which other hosts reach it, if not what they have configured",
	"$.socket":                    "for root on this host",
	"$.state_dir":                 "survives the host: definitions, records, reports",
	"$.run_dir":                   "may be lost with a restart of the host: sockets",
	"$.memory_dir":                "the guests' RAM; must be a tmpfs",
	"$.memory_reserve":            "stays available when a guest comes here",
	"$.tls":                       "made with `lmctl pki issue`",
	"$.peers":                     "other hosts, NAME: ADDRESS:PORT",
	"$.hypervisor":                "qemu: lmctl's own guests; libvirt: the domains of this host's libvirtd",
	"$.libvirt":                   "of hypervisor libvirt: how to reach it",
	"$.metrics":                   "Prometheus, ADDRESS:PORT or unix:/PATH; empty for none",
	"$.log":                       "level: debug, info, warn, error; format: text, json",
	"$.peer_timeout":              "how long another host may be silent",
	"$.migration":                 "unless the request says otherwise",
	"$.migration.max_passes":      "live passes at most",
	"$.migration.downtime_target": "pre-copy ends when the rest fits into this",
	"$.migration.bandwidth":       "bytes a second for the live passes, 0 for no limit",
	"$.migration.streams":         "parallel data connections",
	"$.migration.timeout":         "for a whole migration, 0s for none",
	"$.migration.history":         "reports to keep",
	"$.stop_timeout":              "how long a stop waits for migrations before it cancels them",
	"$.limits":                    "what others can make this agent do at once",
	"$.limits.handshakes":         "connections that have not shown a certificate yet",
	"$.limits.migrations":         "away from this host",
}

// Print writes the configuration with comments; it can be read back.
func (c Config) Print(w io.Writer) error {
	cm := yaml.CommentMap{}
	for path, text := range comments {
		cm[path] = []*yaml.Comment{yaml.HeadComment(" " + text)}
	}
	b, err := yaml.MarshalWithOptions(c, yaml.WithComment(cm), yaml.Indent(2))
	if err != nil {
		return fmt.Errorf("agent: write the configuration: %w", err)
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("agent: write the configuration: %w", err)
	}
	return nil
}
