package devstate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"

	"golang.org/x/sync/errgroup"
)

// withReturnPath is a stream as a QEMU writes it that has opened a return path.
func withReturnPath(t *testing.T, in []byte) []byte {
	t.Helper()
	ram := bytes.Index(in, new(stream).ramStart().Bytes()[5:])
	if ram < 5 {
		t.Fatal("no ram section")
	}
	ram -= 5
	s := new(stream).text(string(in[:ram]))
	s.u8(command).u16(cmdOpenReturnPath).u16(0)
	s.u8(command).u16(cmdPing).u16(4).u32(7)
	return s.text(string(in[ram:])).Bytes()
}

// ended are the captured beginnings with an end like QEMU's.
func ended(t *testing.T) map[string][]byte {
	const devices = `{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}`
	all := captured(t)
	for name, in := range all {
		all[name] = new(stream).text(string(in)).u8(endOfFile).u8(description).u32(uint32(len(devices))).text(devices).Bytes()
	}
	return all
}

// message reads one of the return path.
func message(r io.Reader) (said, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return said{}, err
	}
	data := make([]byte, binary.BigEndian.Uint16(head[2:]))
	_, err := io.ReadFull(r, data)
	return said{binary.BigEndian.Uint16(head[:]), string(data)}, err
}

// said is a message of the return path.
type said struct {
	kind uint16
	data string
}

// A QEMU hears what its destination would say, and closes only then.
func TestConverse(t *testing.T) {
	const seven, zero = "\x00\x00\x00\x07", "\x00\x00\x00\x00"
	for name, in := range ended(t) {
		t.Run(name, func(t *testing.T) {
			converses(t, in, false, said{msgPong, seven}, said{msgShut, zero})
		})
		t.Run(name+", acknowledged", func(t *testing.T) {
			converses(t, in, true, said{msgSwitchoverAck, ""}, said{msgPong, seven}, said{msgShut, zero})
		})
	}
}

// converses writes a stream as QEMU does, and looks what is answered and what
// comes out.
func converses(t *testing.T, in []byte, acknowledge bool, answers ...said) {
	qemu, ours := net.Pipe()
	var work errgroup.Group
	work.Go(func() error {
		sent := make(chan error, 1)
		go func() {
			_, err := qemu.Write(withReturnPath(t, in))
			sent <- err
		}()
		for _, want := range answers {
			if got, err := message(qemu); err != nil || got != want {
				t.Errorf("said %+v, %v; want %+v", got, err, want)
			}
		}
		return errors.Join(<-sent, qemu.Close())
	})
	var out bytes.Buffer
	err := Converse(&out, ours, acknowledge)
	if err := errors.Join(err, ours.Close(), work.Wait()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), rewritten(t, in)) {
		t.Error("the stream is not that without a return path, rewritten")
	}
}

// A stream that breaks off is no whole one, wherever that is.
func TestConverseBroken(t *testing.T) {
	for name, in := range ended(t) {
		whole := withReturnPath(t, in)
		for _, n := range []int{len(whole) / 4, len(whole) / 2, len(whole) - 1} {
			qemu, ours := net.Pipe()
			var work errgroup.Group
			work.Go(func() error {
				sent := make(chan error, 1)
				go func() {
					_, err := qemu.Write(whole[:n])
					sent <- err
				}()
				_, err := message(qemu) // the answer to its ping
				return errors.Join(err, <-sent, qemu.Close())
			})
			err := Converse(io.Discard, ours, false)
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s, %d of %d bytes: %v", name, n, len(whole), err)
			}
			if err := errors.Join(ours.Close(), work.Wait()); err != nil {
				t.Error(err)
			}
		}
	}
}

// Without a return path nothing is said, and the stream ends when it does.
func TestConverseOneWay(t *testing.T) {
	for name, in := range captured(t) {
		var out bytes.Buffer
		conn := struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(in), refusing{t}}
		if err := Converse(&out, conn, true); err != nil || !bytes.Equal(out.Bytes(), rewritten(t, in)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type refusing struct{ t *testing.T }

func (r refusing) Write(p []byte) (int, error) {
	r.t.Errorf("%x was said to a QEMU that does not listen", p)
	return len(p), nil
}

func FuzzComplete(f *testing.F) {
	f.Add([]byte("\x00\x06\x00\x00\x00\x02{}"))
	f.Add([]byte("}"))
	f.Add([]byte("\x00\x06\x00\x00\x00\x02{}}"))
	f.Fuzz(func(t *testing.T, tail []byte) {
		if complete(tail) && (len(tail) < 8 || tail[len(tail)-1] != '}') {
			t.Errorf("%q is taken for an end", tail)
		}
	})
}
