package announce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

func native(v ...uint16) (b []byte) {
	for _, x := range v {
		b = binary.NativeEndian.AppendUint16(b, x)
	}
	return b
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestRepack(t *testing.T) {
	ours := []byte{2, 0, 0, 0, 0, 1}
	body := append([]byte{0x88, 0xb5}, make([]byte, 46)...)
	good := join(guestMAC, otherMAC, body)
	sent := join(guestMAC, ours, body)
	plain := make([]byte, 10)
	bare := tapFormat{order: binary.NativeEndian}
	vnet := tapFormat{header: 12, order: binary.NativeEndian}
	info := tapFormat{info: 4, header: 10, order: binary.NativeEndian}
	big := tapFormat{header: 12, order: binary.BigEndian}
	hdr := func(flags, gso byte, rest ...uint16) []byte { return join([]byte{flags, gso}, native(rest...)) }
	tests := []struct {
		name   string
		format tapFormat
		in     []byte
		want   []byte
		err    error
	}{
		{"no header", bare, good, join(plain, sent), nil},
		{"header of 12", vnet, join(plain, []byte{1, 0}, good), join(plain, sent), nil},
		{"packet information", info, join([]byte{0, 0, 8, 0}, plain, good), join(plain, sent), nil},
		{"data valid is not passed on", vnet, join(hdr(2, 0, 0, 0, 0, 0), []byte{0, 0}, good), join(plain, sent), nil},
		{"checksum", vnet, join(hdr(1, 0, 0, 0, 34, 6), []byte{0, 0}, good), join(hdr(1, 0, 0, 0, 34, 6), sent), nil},
		{"other byte order", big, join([]byte{1, 1, 0, 54, 0, 10, 0, 34, 0, 16, 0, 0}, good), join(hdr(1, 1, 54, 10, 34, 16), sent), nil},
		{"segments", vnet, join(hdr(1, 0x81, 54, 10, 34, 16), []byte{0, 0}, good), join(hdr(1, 0x81, 54, 10, 34, 16), sent), nil},
		{"checksum outside", vnet, join(hdr(1, 0, 0, 0, 34, 27), []byte{0, 0}, good), nil, errMalformed},
		{"checksum in the Ethernet header", vnet, join(hdr(1, 0, 0, 0, 12, 0), []byte{0, 0}, good), nil, errMalformed},
		{"segments without checksum", vnet, join(hdr(0, 1, 54, 10, 0, 0), []byte{0, 0}, good), nil, errMalformed},
		{"segments of no size", vnet, join(hdr(1, 1, 54, 0, 34, 16), []byte{0, 0}, good), nil, errMalformed},
		{"broadcast", bare, join(bytes.Repeat([]byte{0xff}, 6), otherMAC, body), nil, errNotForIt},
		{"multicast", bare, join([]byte{0x33, 0x33, 0, 0, 0, 1}, otherMAC, body), nil, errNotForIt},
		{"to another", bare, join(otherMAC, otherMAC, body), nil, errNotForIt},
		{"from the guest", bare, join(guestMAC, guestMAC, body), nil, errNotForIt},
		{"from a group", bare, join(guestMAC, []byte{1, 0, 0, 0, 0, 0}, body), nil, errNotForIt},
		{"cut short", vnet, join(plain, []byte{0, 0}, good[:13]), nil, errMalformed},
		{"empty", bare, nil, nil, errMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.format.repack(bytes.Clone(tt.in), guestMAC, ours)
			if !errors.Is(err, tt.err) || !bytes.Equal(got, tt.want) {
				t.Errorf("got %x, %v\nwant %x, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

func TestTag(t *testing.T) {
	head := join(guestMAC, otherMAC)
	rest := append([]byte{0x08, 0x00}, make([]byte, 46)...)
	hdr := join([]byte{1, 1}, native(54, 1000, 34, 16))
	moved := join([]byte{1, 1}, native(58, 1000, 38, 16))
	in := join(hdr, head, rest)
	if got, want := tag(in, 10), join(moved, head, []byte{0x81, 0, 0, 10}, rest); !bytes.Equal(got, want) {
		t.Errorf("got %x\nwant %x", got, want)
	}
	if got := tag(in, 0); !bytes.Equal(got, in) {
		t.Errorf("no VLAN: got %x", got)
	}
	tagged := tag(in, 10)
	if got := tag(tagged, 20); !bytes.Equal(got, tagged) {
		t.Errorf("tagged twice: %x", got)
	}
}

func FuzzRepack(f *testing.F) {
	good := join(guestMAC, otherMAC, []byte{8, 0}, make([]byte, 46))
	f.Add(good, 0, 0, true)
	f.Add(join([]byte{1, 1}, native(54, 1000, 34, 16), []byte{0, 0}, good), 0, 12, false)
	f.Add(join(make([]byte, 14), good), 4, 10, false)
	f.Fuzz(func(t *testing.T, b []byte, info, header int, little bool) {
		format := tapFormat{order: binary.BigEndian}
		if little {
			format.order = binary.LittleEndian
		}
		if info != 0 {
			format.info = 4
		}
		if header != 0 {
			format.header = offloadHeader + int(uint(header)%246)
		}
		in := bytes.Clone(b)
		out, err := format.repack(b, guestMAC, otherMAC)
		if err != nil {
			return
		}
		size := len(in) - format.info - format.header
		if len(out) != offloadHeader+size {
			t.Fatalf("%d bytes became %d", size, len(out)-offloadHeader)
		}
		eth := out[offloadHeader:]
		if !bytes.Equal(eth[:6], guestMAC) || !bytes.Equal(eth[6:12], otherMAC) || !bytes.Equal(eth[12:], in[len(in)-size+12:]) {
			t.Fatalf("the frame changed: %x", eth)
		}
		if tagged := tag(out, 10); len(tagged) != len(out) && len(tagged) != len(out)+4 {
			t.Fatalf("tagging made %d bytes of %d", len(tagged), len(out))
		}
	})
}
