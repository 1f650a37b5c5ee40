package control

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func full() Settings {
	s := Defaults()
	s.Addresses = []netip.Prefix{netip.MustParsePrefix("10.77.0.100/24"), netip.MustParsePrefix("fd00:77::64/64")}
	s.Gateways = []netip.Addr{netip.MustParseAddr("10.77.0.254")}
	s.Memory = MemorySetting{Rate: Unbounded, WorkingSet: 1 << 20, Pattern: Random, CheckRate: 123456}
	s.Static, s.Seed, s.Device, s.Disk = 4096, 99, "/dev/vda", DiskSetting{Rate: 20, Readers: 3}
	s.Tick, s.Report = time.Millisecond, 3*time.Second
	return s
}

func TestCmdlineRoundTrip(t *testing.T) {
	for _, want := range []Settings{Defaults(), full()} {
		got, err := ParseCmdline("console=ttyS0 quiet " + want.Cmdline() + " panic=1")
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

func TestCmdlineRefuses(t *testing.T) {
	for line, want := range map[string]string{
		"lmctl.rate=fast":                   "lmctl.rate=fast",
		"lmctl.rate=-7":                     "rate of -7",
		"lmctl.rate=1 lmctl.set=0":          "no working set",
		"lmctl.set=-1":                      "working set of -1",
		"lmctl.pattern=zigzag":              "zigzag",
		"lmctl.tick=1ns":                    "tick of 1ns",
		"lmctl.report=1ms":                  "report every 1ms",
		"lmctl.static=-5":                   "static set",
		"lmctl.addr=10.0.0.1":               "lmctl.addr",
		"lmctl.gw=here":                     "lmctl.gw",
		"lmctl.diskrate=4":                  "no device",
		"lmctl.disk=d lmctl.diskrate=-4":    "-4 records",
		"lmctl.disk=d lmctl.diskreaders=-1": "-1 readers",
		"lmctl.unheard=1":                   "no such setting",
		"lmctl.checkrate=999999999999999":   "check rate",
	} {
		if _, err := ParseCmdline(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", line, err, want)
		}
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("")
	f.Add(full().Cmdline())
	f.Add("lmctl.rate=max lmctl.rate lmctl. =")
	f.Fuzz(func(t *testing.T, line string) {
		s, err := ParseCmdline(line)
		if err != nil {
			return
		}
		again, err := ParseCmdline(s.Cmdline())
		if err != nil {
			t.Fatalf("%q gives %q, which is refused: %v", line, s.Cmdline(), err)
		}
		if again.Cmdline() != s.Cmdline() {
			t.Fatalf("%q gives %q, then %q", line, s.Cmdline(), again.Cmdline())
		}
	})
}

func FuzzParseReply(f *testing.F) {
	f.Add([]byte(`{"status":{"ok":true,"boot_id":"x"}}`))
	f.Add([]byte(`{"error":"no"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, line []byte) {
		st, err := ParseReply(line)
		if err != nil && !reflect.DeepEqual(st, Status{}) {
			t.Fatalf("a status beside an error: %+v", st)
		}
	})
}

// answer is a guest that gives one line back for each that it gets.
func answer(t *testing.T, reply string) *Client {
	t.Helper()
	here, there := net.Pipe()
	go func() {
		defer there.Close()
		in := bufio.NewScanner(there)
		for in.Scan() && reply != "" {
			if _, err := there.Write([]byte(reply)); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { here.Close() })
	return NewClient(here)
}

func TestClient(t *testing.T) {
	st, err := answer(t, `{"status":{"ok":true,"boot_id":"b"}}`+"\n").Do(t.Context(), Request{Do: GetStatus})
	if err != nil || !st.OK || st.BootID != "b" {
		t.Errorf("status %+v, error %v", st, err)
	}
	for reply, want := range map[string]string{
		`{"error":"no such page"}` + "\n": "no such page",
		"{}\n":                            "without a status",
		"welcome\n":                       "not understood",
		"":                                "unexpected EOF",
	} {
		if _, err := answer(t, reply).Do(t.Context(), Request{Do: CheckAll}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("reply %q: error %v, want one with %q", reply, err, want)
		}
	}
}

func TestClientCancel(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	defer here.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewClient(here).Do(ctx, Request{Do: GetStatus}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the cancellation", err)
	}
}
