package agent

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestConfigKeepsDefaults(t *testing.T) {
	want, err := DefaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "# nothing\n", "---\n"} {
		got, err := ParseConfig([]byte(text))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if got.Listen != want.Listen || got.Limits != want.Limits {
			t.Errorf("%q: %+v", text, got)
		}
	}
	got, err := ParseConfig([]byte("name: alpha\nlog:\n  level: debug\nlimits: {handshakes: 3}\nmigration:\n  bandwidth: 100MiB/s\n  downtime_target: 50ms\npeers:\n  beta: 192.0.2.2:7410\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != "alpha" || got.Log.Level != "debug" || got.Log.Format != "text" || got.Limits.Handshakes != 3 ||
		got.Limits.Connections != want.Limits.Connections || got.Migration.Bandwidth != 100<<20 ||
		got.Migration.DowntimeTarget != 50*time.Millisecond || got.Migration.MaxPasses != 8 || got.Peers["beta"] != "192.0.2.2:7410" {
		t.Errorf("%+v", got)
	}
}

func TestConfigPrintReadsBack(t *testing.T) {
	cfg, err := ParseConfig([]byte("name: alpha\npeers:\n  beta: 192.0.2.2:7410\n"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := cfg.Print(&out); err != nil {
		t.Fatal(err)
	}
	for path, comment := range comments {
		if !strings.Contains(out.String(), "# "+comment) {
			t.Errorf("%s is not explained", path)
		}
	}
	back, err := ParseConfig(out.Bytes())
	if err != nil {
		t.Fatalf("%v in\n%s", err, out.String())
	}
	var again bytes.Buffer
	if err := back.Print(&again); err != nil {
		t.Fatal(err)
	}
	if again.String() != out.String() {
		t.Errorf("printed\n%s\nread and printed again\n%s", out.String(), again.String())
	}
}

func TestConfigErrors(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"nmae: x", `unknown field "nmae"`},
		{"name: x\nlimits:\n  hand: 3\n", "[3:3]"},
		{"name: [", "[1:7]"},
		{"name: ../x", "name: pki"},
		{"name: x\nlisten: here", `listen: "here" is not ADDRESS:PORT`},
		{"name: x\nstate_dir: var", "state_dir"},
		{"name: x\npeers: {x: 'a:1'}", `peers: "x" cannot be another host's name`},
		{"name: x\npeers: {y: 'a'}", `peers.y: "a" is not ADDRESS:PORT`},
		{"name: x\nhypervisor: vmware", "must be qemu"},
		{"name: x\nlog: {level: loud}", "log.level"},
		{"name: x\nlog: {format: xml}", "log.format"},
		{"name: x\nmetrics: 'unix:sock'", "metrics"},
		{"name: x\npeer_timeout: soon", `invalid duration "soon"`},
		{"name: x\npeer_timeout: 0s", "peer_timeout: 0s must be more than nothing"},
		{"name: x\nmigration: {bandwidth: fast}", "is no size"},
		{"name: x\nmigration: {streams: 0}", "migration.streams: 0 must be at least 1"},
		{"name: x\nmigration: {streams: 17}", "migration.streams: 17 must be at most 16"},
	} {
		_, err := ParseConfig([]byte(tc.text))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: %v, want %q", tc.text, err, tc.want)
		}
	}
}
