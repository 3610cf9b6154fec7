// Computes the planner's formulas: {names, operations, operands}, as trimtab/planning/trace.py writes them.
function evaluate(table, inputs) {
  const values = [], { names, operations, operands } = table;
  let next = 0;
  const take = () => values[operands[next++]];
  for (const operation of operations) {
    let x, y;
    switch (operation) {
      case "k": values.push(operands[next++]); continue;
      case "i": values.push(inputs[names[operands[next++]]]); continue;
      case "c": values.push(Math.ceil(take())); continue;
      case "f": values.push(Math.floor(take())); continue;
      case "?": x = take(); y = take(); values.push(x > 0 ? (take(), y) : take()); continue;
    }
    x = take(); y = take();
    switch (operation) {
      case "+": values.push(x + y); break;
      case "-": values.push(x - y); break;
      case "*": values.push(x * y); break;
      case "/": values.push(x / y); break;
      case "^": values.push(x ** y); break;
      case "M": values.push(Math.max(x, y)); break;
      case "m": values.push(Math.min(x, y)); break;
      case "q": {
        // As Python's //, which is exact: Math.floor(1 / 0.1) is 10, and 0.1 goes 9 times into 1.
        const rest = x % y;
        values.push(Math.round((x - (rest && rest < 0 !== y < 0 ? rest + y : rest)) / y));
        break;
      }
      default: throw new Error(`no operation ${operation}`);
    }
  }
  return values;
}
