package main

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/alecthomas/kong"
)

// textMappers make kong take words as they are. Its own mappers of strings and
// paths pass them through JSON, which replaces the bytes of a file's name that
// are not UTF-8, and costs more than all else of parsing.
var textMappers = []kong.Option{
	kong.KindMapper(reflect.String, kong.MapperFunc(decodeString)),
	kong.NamedMapper("path", kong.MapperFunc(decodePath)),
}

func decodeString(ctx *kong.DecodeContext, target reflect.Value) error {
	token, err := ctx.Scan.PopValue("string")
	if err != nil {
		return err
	}
	target.SetString(fmt.Sprint(token.Value))
	return nil
}

// decodePath decodes a path, or one more of a repeatable flag, as kong's own
// mapper does: absolute, with the home folder in place of a first ~.
func decodePath(ctx *kong.DecodeContext, target reflect.Value) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return errors.New("missing value, expecting a path")
	}
	path := fmt.Sprint(token.Value)
	if path != "-" {
		path = kong.ExpandPath(path)
	}
	if target.Kind() == reflect.Slice {
		target.Set(reflect.Append(target, reflect.ValueOf(path)))
		return nil
	}
	target.SetString(path)
	return nil
}
