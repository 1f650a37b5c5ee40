package announce

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the hypervisor left in the tap before the stop is sent on, what it had
// read is not.
func TestStrandedUnread(t *testing.T) {
	n := newNetwork(t, unix.IFF_VNET_HDR)
	n.offload(t)
	n.guestAtSource(t)
	s := n.strand(t)
	const read, before, after = 3, 8, 12
	n.datagrams(0, before)
	awaitHeld(t, s, before)
	for got := 0; got < read; {
		if b := receive(t, n.old); bytes.Equal(b[12:18], guestMAC) {
			got++
		}
	}
	s.Stopped(time.Now())
	n.datagrams(before, after)
	awaitHeld(t, s, after)
	raw, err := n.old.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = s.Unread(int(fd)) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	n.moveGuest(t)
	if sent, err := s.Forward(past(t)); sent != after-read || err != nil {
		t.Fatalf("%d sent on, want %d; %v", sent, after-read, err)
	}
	for i := read; i < after; i++ {
		b := nextFrom(t, n.new, ipUDP)
		if got, want := string(ipPayload(t, b, ipUDP)), fmt.Sprintf("datagram %d", i); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := s.Unread(int(file.Fd())); err == nil || !strings.Contains(err.Error(), "TUNGETIFF") {
		t.Errorf("not a tap: %v", err)
	}
}

func TestKeepUnread(t *testing.T) {
	frame := func(c byte) []byte { return append(make([]byte, offloadHeader+offType), c) }
	tests := []struct{ name, early, late, unread, want string }{
		{"nothing unread", "abc", "de", "", "de"},
		{"all from the stop on", "abc", "de", "de", "de"},
		{"some from before", "abc", "de", "bcde", "bcde"},
		{"the last place counts", "aba", "de", "a", "ade"},
		{"a longer match", "abab", "d", "abd", "abd"},
		{"the queue was full", "abc", "de", "bc", "bcde"},
		{"older than all that is held", "bc", "de", "abcde", "de"},
	}
	for _, tt := range tests {
		s := &Stranded{limit: 10, more: make(chan struct{}, 1)}
		for i, c := range []byte(tt.early + tt.late) {
			at := time.Unix(1, 0)
			if i >= len(tt.early) {
				at = time.Unix(2, 0)
			}
			s.hold(heldFrame{at: at, b: frame(c)})
		}
		s.Stopped(time.Unix(2, 0))
		var unread [][]byte
		for _, c := range []byte(tt.unread) {
			unread = append(unread, []byte{c})
		}
		s.keepUnread(unread)
		s.discard(s.early())
		var got []byte
		for _, f := range s.held {
			got = append(got, f.b[len(f.b)-1])
		}
		if string(got) != tt.want || s.kept != len(got) {
			t.Errorf("%s: %s, %d kept, want %s", tt.name, got, s.kept, tt.want)
		}
	}
}

func TestTapFDs(t *testing.T) {
	s := newSpace(t)
	const name = "lmtest-tap"
	f := s.tap(name, 0)
	fds, err := TapFDs(os.Getpid(), name)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if len(fds) != 1 || fds[0] != int(fd) {
			t.Errorf("descriptors %v, want %d", fds, fd)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := TapFDs(os.Getpid(), "lmtest-none"); err == nil {
		t.Error("a tap that is not there: no error")
	}
	if _, err := TapFDs(1<<30, name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no process: %v", err)
	}
}
