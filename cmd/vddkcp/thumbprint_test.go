package main

import (
	"fmt"
	"testing"
)

func TestSplitHost(t *testing.T) {
	for s, want := range map[string]string{
		"esxi":                 "esxi 443",
		"esxi.example.com:444": "esxi.example.com 444",
		"192.0.2.1":            "192.0.2.1 443",
		"192.0.2.1:1":          "192.0.2.1 1",
		"::1":                  "::1 443",
		"[::1]":                "::1 443",
		"[::1]:65535":          "::1 65535",
		"2001:db8::1":          "2001:db8::1 443",
		"fe80::1%eth0":         "fe80::1%eth0 443",
		"[fe80::1%eth0]:8443":  "fe80::1%eth0 8443",
		"":                     "", ":443": "", "esxi:": "", "esxi:0": "", "esxi:65536": "", "esxi:x": "", "a:b:c": "", "[::1": "", "[::1]x": "", "[]": "",
		"[a:b]:1": "", "https://esxi": "", "root@esxi": "", "a b": "", "::1]:443": "",
	} {
		host, port, err := splitHost(s)
		got := ""
		if err == nil {
			got = fmt.Sprintf("%s %d", host, port)
		}
		if got != want {
			t.Errorf("%q: %q, %v; want %q", s, got, err, want)
		}
	}
}
