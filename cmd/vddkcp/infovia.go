package main

import (
	"fmt"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vddk"
)

// wayFacts is what vddkcp info prints about a way in which a disk on a server can be read.
type wayFacts struct {
	Via       string `json:"via"`
	Available bool   `json:"available"`
	Chosen    string `json:"chosen,omitempty"` // why vddkcp reads the disk in this way; "" if it does not
	Detail    string `json:"detail"`
}

// The method ways describes the ways in which the disk at an address on a server can be read.
func (f *sourceFlags) ways(a address.Address) []wayFacts {
	r, err := f.resolve()
	if err != nil {
		return nil // the disk could not be opened
	}
	through := wayFacts{Via: string(viaVDDK)}
	libDir, _ := f.library(r, f.LibDir, f.NFCHostPort)
	if library, err := vddk.FindLibrary(libDir); err != nil {
		through.Detail = err.Error()
	} else {
		through.Available, through.Detail = true, fmt.Sprintf("VDDK %d, %s", library.Version, library.Path)
	}
	over := wayFacts{Via: string(viaNFC), Available: true, Detail: "experimental"}
	if isForVDDK(a) {
		over.Available, over.Detail = false, "the address begins with vddk:"
	}
	chosen := &through
	if f.chosen.nfc {
		chosen = &over
	}
	chosen.Chosen = f.chosen.reason
	return []wayFacts{through, over}
}

func (w *wayFacts) String() string {
	text := "not available"
	if w.Available {
		text = "available"
	}
	if w.Chosen != "" {
		text += ", " + printable.Name(w.Chosen)
	}
	return text + ": " + printable.Line(w.Detail)
}
